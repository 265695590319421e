"""Memorisation: how much more likely a model finds a secret of its training text than all other possible secrets.

A canary is a line with a random secret, inserted into the text a known number of times. Its exposure is
log2 |R| - log2 rank, where R are all secrets of its form and the rank is its rank among them by likelihood (Carlini et
al. 2019, definition 5). A model that knows nothing of the secret has 1.44 bits on average; one that ranks it first has
log2 |R|. Ranks are exact: every secret of the form is scored, and those with a common prefix share its computation.
"""

import math
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from gptjax.config import ModelConfig
from gptjax.errors import PromptError
from gptjax.inference.cache import is_unbounded
from gptjax.inference.engine import prepare_for_inference
from gptjax.inference.pretrained import Pretrained, check_is_generative
from gptjax.model.gpt import GPT, Params


def secret_nll(pretrained: Pretrained, prefix: str, symbols: str, length: int, batch_size: int = 1024) -> np.ndarray:
    """The negative log-likelihood of every secret of `length` symbols after a prefix: float64 [symbols ** length].

    The order is that of numbers whose digits are the symbols. Raises `PromptError` for a bidirectional model, a
    tokenizer in which a symbol is not one token there, and texts longer than the learned positions.
    """
    check_is_generative(pretrained)
    if not pretrained.model.causal:
        raise PromptError(f"{pretrained.name}: its attention is bidirectional, so a secret has no probability")
    prefix_ids, symbol_ids = _encode(pretrained, prefix, symbols, length)
    config, params = prepare_for_inference(pretrained)
    if not is_unbounded(config) and len(prefix_ids) + length > config.context_length:
        raise PromptError(
            f"{pretrained.name}: has learned positions for {config.context_length} tokens, but prefix and secret have "
            f"{len(prefix_ids) + length}; shorten the prefix"
        )
    texts, nll = prefix_ids[None], np.zeros(1)
    for position in range(length):
        batches = (texts[start : start + batch_size] for start in range(0, len(texts), batch_size))
        log_probs = np.concatenate(
            [_next_log_probs(params, _fill_batch(batch, batch_size), symbol_ids, config=config) for batch in batches]
        )
        nll = (nll[:, None] - log_probs[: len(texts)].astype(np.float64)).ravel()
        if position + 1 < length:
            next_symbols = np.tile(symbol_ids, len(texts))[:, None]
            texts = np.concatenate([np.repeat(texts, len(symbol_ids), 0), next_symbols], 1)
    return nll


def exposure(nll: np.ndarray, secret: int) -> float:
    """The exposure in bits of one of the scored secrets; equally likely secrets have their mean rank."""
    rank = (nll < nll[secret]).sum() + ((nll == nll[secret]).sum() + 1) / 2
    return math.log2(len(nll)) - math.log2(rank)


def _encode(pretrained: Pretrained, prefix: str, symbols: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the prefix, and the id of every symbol."""
    prefix_ids = pretrained.tokenizer.encode(prefix)
    symbol_ids = []
    for symbol in symbols:
        ids = pretrained.tokenizer.encode(prefix + symbol * length)
        keeps_prefix = len(ids) == len(prefix_ids) + length and (ids[: len(prefix_ids)] == prefix_ids).all()
        if not keeps_prefix or len({*ids[len(prefix_ids) :]}) != 1:
            raise PromptError(
                f"{pretrained.name}: its tokenizer does not make one token of {symbol!r} after {prefix!r}; exposure "
                "needs a tokenizer with one token per symbol, for instance data.tokenizer = 'byte' or 'char'"
            )
        symbol_ids.append(ids[-1])
    return prefix_ids.astype(np.int32), np.array(symbol_ids, np.int32)


def _fill_batch(texts: np.ndarray, rows: int) -> np.ndarray:
    """Repeats the first text in the unused rows, so that one program serves all batches of a length."""
    return np.concatenate([texts, np.repeat(texts[:1], rows - len(texts), 0)])


@partial(jax.jit, static_argnames="config")
def _next_log_probs(
    params: Params, texts: Int[Array, "batch length"], ids: Int[Array, " ids"], *, config: ModelConfig
) -> Float[Array, "batch ids"]:
    """The log-probabilities of some tokens after each text."""
    x: Any = GPT(config).apply({"params": params}, texts, method="hidden_states")
    logits: Any = GPT(config).apply({"params": params}, x[:, -1:], method="logits")
    return jax.nn.log_softmax(logits[:, 0])[:, ids]
