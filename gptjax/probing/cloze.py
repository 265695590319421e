"""Fill-in: which token stands in a gap, told from the text to its left or from both sides, by any model.

A model that sees the whole text reads a mask in the gap and names the likeliest token there. A causal model names the
likeliest token after the left side. From both sides it goes by Bayes' rule, as p(v | left, right) is proportional to
p(v | left) p(right | left, v): the text is scored with each of the likeliest candidates v of the left side in the gap.
With as many candidates as there are tokens the rule is exact; with fewer a token is lost that the left side alone
makes unlikely.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from gptjax import config, random_streams
from gptjax.data.objectives import extra_ids
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import DataError, PromptError
from gptjax.inference.cache import bucket, rolls
from gptjax.inference.engine import set_up
from gptjax.inference.pretrained import Pretrained, check_is_generative
from gptjax.inference.scoring import Part, Scorer
from gptjax.model.gpt import GPT


class ClozeItem(NamedTuple):
    """A text with one token that is to be told, `ids[place]`."""

    ids: np.ndarray  # int32 [n]
    place: int  # at least 1: something stands to the left

    @property
    def truth(self) -> int:
        """The token that is hidden."""
        return int(self.ids[self.place])


def hide(texts: Iterable[np.ndarray], count: int, longest: int, tokenizer: Tokenizer, seed: int) -> list[ClozeItem]:
    """A gap in each of `count` texts (int32 ids [n]), drawn from those of at most `longest` tokens; places are uniform.

    Hidden are tokens that stand for some text, never the first. Raises `DataError` where there are too few texts.
    """
    rng = np.random.default_rng((seed, random_streams.CLOZE))
    standing = _standing_for_text(tokenizer)
    fit = []
    for ids in texts:
        places = 1 + np.flatnonzero(np.isin(ids[1:], standing))
        if len(ids) <= longest and len(places):
            fit.append((ids, places))
    if len(fit) < count:
        raise DataError(f"{count} texts of 2 to {longest} tokens are needed for as many gaps; there are {len(fit)}")
    drawn = rng.choice(len(fit), count, replace=False)
    return [ClozeItem(fit[i][0], int(rng.choice(fit[i][1]))) for i in drawn]


def predict_left_to_right(
    pretrained: Pretrained, gaps: Sequence[ClozeItem], allowed: np.ndarray | None = None, batch_size: int = 32
) -> np.ndarray:
    """The likeliest token in each gap for a model that is shown what stands to the left alone: int32 [gaps].

    `allowed`: the ids to choose from, [n] or for each gap its own [gaps, n]; None: all that stand for some text. Raises
    `PromptError` for a model that cannot be asked: one that sees the whole text and has no mask, that tells classes, or
    whose table of positions is too short.
    """
    shown = [ClozeItem(gap.ids[: gap.place + 1], gap.place) for gap in gaps]
    return _ranked(pretrained, shown, allowed, batch_size)[:, 0]


def predict_bidirectional(
    pretrained: Pretrained,
    gaps: Sequence[ClozeItem],
    allowed: np.ndarray | None = None,
    candidates: int = 64,
    batch_size: int = 32,
) -> np.ndarray:
    """The same for a model that is shown all but the hidden token. `candidates`: of a causal model, see above."""
    ranked = _ranked(pretrained, gaps, allowed, batch_size)
    if not pretrained.model.causal:
        return ranked[:, 0]
    likeliest = ranked[:, :candidates]
    pairs = ((gap, v) for gap, row in zip(gaps, likeliest, strict=True) for v in row)
    parts = (Part(_with(gap, v), len(gap.ids) - gap.place) for gap, v in pairs)
    nats = [answer.nats.sum(dtype=np.float64) for answer in Scorer(pretrained, batch_size).answer(parts)]
    best = np.reshape(nats, likeliest.shape).argmin(-1)
    return likeliest[np.arange(len(gaps)), best]


def _ranked(
    pretrained: Pretrained, gaps: Sequence[ClozeItem], allowed: np.ndarray | None, batch_size: int
) -> np.ndarray:
    """The allowed tokens of each gap, the likeliest first, to a model that is not shown the gap: int32 [gaps, n]."""
    allowed = _standing_for_text(pretrained.tokenizer) if allowed is None else allowed
    logits = _logits_in_gaps(pretrained, gaps, batch_size)
    allowed = np.broadcast_to(allowed, (len(gaps), allowed.shape[-1]))
    order = np.argsort(-np.take_along_axis(logits, allowed, -1), axis=-1, kind="stable")
    return np.take_along_axis(allowed, order, -1).astype(np.int32)


def _with(gap: ClozeItem, token: int) -> np.ndarray:
    """The text with another token in the gap."""
    ids = gap.ids.copy()
    ids[gap.place] = token
    return ids


def _standing_for_text(tokenizer: Tokenizer) -> np.ndarray:
    return np.array([i for i, piece in enumerate(tokenizer.id_to_bytes) if piece], np.int32)


def mask_id(pretrained: Pretrained) -> int:
    """The id that hides a token. Raises `PromptError` for a model that has none."""
    (mask,) = extra_ids(config.ObjectiveConfig(name="mlm"), pretrained.tokenizer)
    if mask >= (pretrained.model.vocab_size or 0):
        raise PromptError(
            f"{pretrained.name}: sees the whole text, but has no mask to hide a token with; give a model that was "
            "trained with objective.name = 'mlm', or a causal one"
        )
    return mask


def _logits_in_gaps(pretrained: Pretrained, gaps: Sequence[ClozeItem], batch_size: int) -> np.ndarray:
    """What a model makes of each gap, float32 [gaps, vocab]: of all that it sees, the hidden token excepted."""
    check_is_generative(pretrained)
    model, params = set_up(pretrained)
    if model.causal:  # the token before the gap says what comes next
        questions = [(gap.ids[: gap.place], gap.place - 1) for gap in gaps]
    else:
        mask = mask_id(pretrained)
        questions = [(_with(gap, mask), gap.place) for gap in gaps]
    longest = max(len(ids) for ids, _ in questions)
    if not rolls(model) and longest > model.context_length:
        raise PromptError(
            f"{pretrained.name}: has learned positions for {model.context_length} tokens, and a text has {longest}; "
            "shorten the texts"
        )
    made = []
    for first in range(0, len(questions), batch_size):
        chosen = questions[first : first + batch_size]
        width = bucket(max(len(ids) for ids, _ in chosen))
        width = width if rolls(model) else min(width, model.context_length)
        tokens, segments = np.zeros((2, batch_size, width), np.int32)
        places = np.zeros(batch_size, np.int32)
        for row, (ids, place) in enumerate(chosen):
            tokens[row, : len(ids)], places[row] = ids, place
            segments[row, : len(ids)] = 1  # or a model that looks ahead would see the padding
        made.append(np.asarray(_logits_at(params, tokens, segments, places, model=model))[: len(chosen)])
    return np.concatenate(made)


@partial(jax.jit, static_argnames="model")
def _logits_at(params: Any, tokens: Array, segments: Array, places: Array, *, model: config.ModelConfig) -> Array:
    """Reads tokens [B, L], each within its segment, and makes logits at one place [B] of each row: [B, vocab]."""
    x: Any = GPT(model).apply({"params": params}, tokens, None, segments, method="hidden_states")
    x = x[np.arange(len(tokens)), places]
    logits: Any = GPT(model).apply({"params": params}, x[None], method="logits")
    return logits[0]
