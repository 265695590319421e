"""Cloze: predicts the token in a gap, from the text to its left or from both sides, with any model.

A bidirectional model reads a mask in the gap, and its argmax there is the prediction. A causal model predicts the token
after the left side. From both sides it uses Bayes' rule, because p(v | left, right) is proportional to
p(v | left) p(right | left, v): it scores the text with each of the top candidates v of the left side in the gap. With
as many candidates as tokens the rule is exact; with fewer it misses tokens that are unlikely given the left side alone.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from gptjax import random_streams
from gptjax.config import ModelConfig
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import DataError, PromptError
from gptjax.inference.cache import is_unbounded, padded_length
from gptjax.inference.engine import prepare_for_inference
from gptjax.inference.pretrained import Pretrained, check_is_generative
from gptjax.inference.scoring import Scorer, ScoreRequest
from gptjax.model.gpt import GPT, Params
from gptjax.objectives.base import extra_ids


class ClozeItem(NamedTuple):
    """A text, and the position of the token to predict."""

    ids: np.ndarray  # int32 [n]
    position: int  # at least 1, so that there is a left side

    @property
    def target(self) -> int:
        """The hidden token."""
        return int(self.ids[self.position])


def make_cloze_items(
    texts: Iterable[np.ndarray], count: int, max_length: int, tokenizer: Tokenizer, seed: int
) -> list[ClozeItem]:
    """A gap in each of `count` texts (int32 ids [n]), sampled from those of at most `max_length` tokens.

    The position is uniform over the tokens that stand for text, without the first. Raises `DataError` if there are too
    few texts.
    """
    rng = np.random.default_rng((seed, random_streams.CLOZE))
    text_tokens = _text_tokens(tokenizer)
    usable = []
    for ids in texts:
        positions = 1 + np.flatnonzero(np.isin(ids[1:], text_tokens))
        if len(ids) <= max_length and len(positions):
            usable.append((ids, positions))
    if len(usable) < count:
        raise DataError(f"{count} texts of 2 to {max_length} tokens are needed for {count} gaps; found {len(usable)}")
    sampled = rng.choice(len(usable), count, replace=False)
    return [ClozeItem(usable[i][0], int(rng.choice(usable[i][1]))) for i in sampled]


def predict_left_to_right(
    pretrained: Pretrained, items: Sequence[ClozeItem], allowed: np.ndarray | None = None, batch_size: int = 32
) -> np.ndarray:
    """The most likely token in each gap given the left side alone: int32 [items].

    `allowed`: the candidate ids, [n] or per item [items, n]; None: all that stand for text. Raises `PromptError` for a
    bidirectional model without a mask token, a classifier, or texts longer than the learned positions.
    """
    left_sides = [ClozeItem(item.ids[: item.position + 1], item.position) for item in items]
    return _ranked(pretrained, left_sides, allowed, batch_size)[:, 0]


def predict_bidirectional(
    pretrained: Pretrained,
    items: Sequence[ClozeItem],
    allowed: np.ndarray | None = None,
    candidates: int = 64,
    batch_size: int = 32,
) -> np.ndarray:
    """The same given both sides. `candidates`: for a causal model, see the top of this file."""
    ranked = _ranked(pretrained, items, allowed, batch_size)
    if not pretrained.model.causal:
        return ranked[:, 0]
    top = ranked[:, :candidates]
    pairs = ((item, token) for item, row in zip(items, top, strict=True) for token in row)
    requests = (ScoreRequest(_fill(item, token), len(item.ids) - item.position) for item, token in pairs)
    nll = [scores.nll.sum(dtype=np.float64) for scores in Scorer(pretrained, batch_size).score_batch(requests)]
    best = np.reshape(nll, top.shape).argmin(-1)
    return top[np.arange(len(items)), best]


def _ranked(
    pretrained: Pretrained, items: Sequence[ClozeItem], allowed: np.ndarray | None, batch_size: int
) -> np.ndarray:
    """The allowed tokens of each gap by their logits, the most likely first: int32 [items, n]."""
    if allowed is None:
        allowed = _text_tokens(pretrained.tokenizer)
    logits = _gap_logits(pretrained, items, batch_size)
    allowed = np.broadcast_to(allowed, (len(items), allowed.shape[-1]))
    order = np.argsort(-np.take_along_axis(logits, allowed, -1), axis=-1, kind="stable")
    return np.take_along_axis(allowed, order, -1).astype(np.int32)


def _fill(item: ClozeItem, token: int) -> np.ndarray:
    """The text with another token in the gap."""
    ids = item.ids.copy()
    ids[item.position] = token
    return ids


def _text_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """The ids that stand for text, without special tokens."""
    return np.array([i for i, text in enumerate(tokenizer.id_to_bytes) if text], np.int32)


def mask_id(pretrained: Pretrained) -> int:
    """The id of the mask token. Raises `PromptError` for a model that has none."""
    (mask,) = extra_ids(("mask",), pretrained.tokenizer)
    if mask >= (pretrained.model.vocab_size or 0):
        raise PromptError(
            f"{pretrained.name}: is bidirectional, but has no mask token; use a model trained with "
            "objective.name = 'mlm', or a causal one"
        )
    return mask


def _gap_logits(pretrained: Pretrained, items: Sequence[ClozeItem], batch_size: int) -> np.ndarray:
    """The logits in each gap, float32 [items, vocab], without access to the hidden token."""
    check_is_generative(pretrained)
    config, params = prepare_for_inference(pretrained)
    if config.causal:  # the token before the gap predicts it
        inputs = [(item.ids[: item.position], item.position - 1) for item in items]
    else:
        mask = mask_id(pretrained)
        inputs = [(_fill(item, mask), item.position) for item in items]
    longest = max(len(ids) for ids, _ in inputs)
    if not is_unbounded(config) and longest > config.context_length:
        raise PromptError(
            f"{pretrained.name}: has learned positions for {config.context_length} tokens, but a text has {longest}; "
            "shorten the texts"
        )
    logits = []
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start : start + batch_size]
        length = padded_length(config, max(len(ids) for ids, _ in batch))
        tokens, segment_ids = np.zeros((2, batch_size, length), np.int32)
        positions = np.zeros(batch_size, np.int32)
        for row, (ids, position) in enumerate(batch):
            tokens[row, : len(ids)] = ids
            positions[row] = position
            segment_ids[row, : len(ids)] = 1  # keeps a bidirectional model from attending to the padding
        batch_logits = _logits_at(params, tokens, segment_ids, positions, config=config)
        logits.append(np.asarray(batch_logits)[: len(batch)])
    return np.concatenate(logits)


@partial(jax.jit, static_argnames="config")
def _logits_at(
    params: Params,
    tokens: Int[Array, "batch length"],
    segment_ids: Int[Array, "batch length"],
    positions: Int[Array, " batch"],
    *,
    config: ModelConfig,
) -> Float[Array, "batch vocab"]:
    """The logits at one position of each row."""
    x: Any = GPT(config).apply({"params": params}, tokens, None, segment_ids, method="hidden_states")
    x = x[np.arange(len(tokens)), positions]
    logits: Any = GPT(config).apply({"params": params}, x[None], method="logits")
    return logits[0]
