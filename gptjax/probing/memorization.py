"""Memorisation: how much likelier a model finds a secret of its training text than all others that it might have been.

A canary is a line with a random secret in it, put into the text a known number of times. Its exposure is
log2 |R| - log2 rank, where R are all secrets of its form and the rank is its place among them by likelihood (Carlini et
al. 2019, definition 5). A model that knows nothing of the secret gives 1.44 bits on average; one that tells it before
all others log2 |R|. Ranks are exact: every secret of the form is scored, those with a common beginning together.
"""

import math
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from gptjax import config
from gptjax.errors import PromptError
from gptjax.inference.cache import rolls
from gptjax.inference.engine import set_up
from gptjax.inference.pretrained import Pretrained, check_is_generative
from gptjax.model.gpt import GPT


def nats_of_all(pretrained: Pretrained, prefix: str, symbols: str, length: int, batch_size: int = 1024) -> np.ndarray:
    """-ln of the probability of every secret of `length` symbols after a prefix: float64 [len(symbols) ** length].

    The order is that of numbers whose digits are the symbols. Raises `PromptError` for a model that looks ahead, for a
    tokenizer in which a symbol is not one token of its own there, and for texts beyond a table of positions.
    """
    check_is_generative(pretrained)
    if not pretrained.model.causal:
        raise PromptError(f"{pretrained.name}: every token sees the whole text, so that no secret has a probability")
    first, ids = _tokens(pretrained, prefix, symbols, length)
    model, params = set_up(pretrained)
    if not rolls(model) and len(first) + length > model.context_length:
        raise PromptError(
            f"{pretrained.name}: has learned positions for {model.context_length} tokens, and prefix and secret have "
            f"{len(first) + length}; shorten the prefix"
        )
    texts, nats = first[None], np.zeros(1)
    for place in range(length):
        batches = (texts[start : start + batch_size] for start in range(0, len(texts), batch_size))
        told = np.concatenate([_next(params, _filled(batch, batch_size), ids, model=model) for batch in batches])
        told = told[: len(texts)]
        nats = (nats[:, None] - told.astype(np.float64)).ravel()
        if place + 1 < length:
            texts = np.concatenate([np.repeat(texts, len(ids), 0), np.tile(ids, len(texts))[:, None]], 1)
    return nats


def exposure(nats: np.ndarray, secret: int) -> float:
    """Bits of exposure of one of the secrets that were scored; of equally likely ones each has their middle rank."""
    rank = (nats < nats[secret]).sum() + ((nats == nats[secret]).sum() + 1) / 2
    return math.log2(len(nats)) - math.log2(rank)


def _tokens(pretrained: Pretrained, prefix: str, symbols: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the prefix, and that of every symbol."""
    first = pretrained.tokenizer.encode(prefix)
    ids = []
    for symbol in symbols:
        whole = pretrained.tokenizer.encode(prefix + symbol * length)
        if (
            len(whole) != len(first) + length
            or len({*whole[len(first) :]}) != 1
            or (whole[: len(first)] != first).any()
        ):
            raise PromptError(
                f"{pretrained.name}: its tokenizer does not make one token of {symbol!r} after {prefix!r}; exposure is "
                "measured where every symbol of a secret is one, data.tokenizer = 'byte' or 'char' for instance"
            )
        ids.append(whole[-1])
    return first.astype(np.int32), np.array(ids, np.int32)


def _filled(texts: np.ndarray, rows: int) -> np.ndarray:
    """With the first text again in the rows that are left over, so that one program serves all batches of a length."""
    return np.concatenate([texts, np.repeat(texts[:1], rows - len(texts), 0)])


@partial(jax.jit, static_argnames="model")
def _next(params: Any, texts: Array, ids: Array, *, model: config.ModelConfig) -> Array:
    """ln of the probabilities of some tokens after each text [B, L]: [B, ids]."""
    x: Any = GPT(model).apply({"params": params}, texts, method="hidden_states")
    logits: Any = GPT(model).apply({"params": params}, x[:, -1:], method="logits")
    return jax.nn.log_softmax(logits[:, 0])[:, ids]
