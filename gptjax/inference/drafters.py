"""Drafters for speculative decoding: they propose the next tokens of texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Key

from gptjax.config import ModelConfig
from gptjax.inference.cache import cache_length_for, empty_cache, limit_window
from gptjax.inference.engine import Engine
from gptjax.inference.generate import DecodeInputs, Request, pad_prompts
from gptjax.inference.sampling import BatchedSamplingParams, TokenHistory, batch_params, process_logits, sample_token
from gptjax.model.gpt import Cache, Params, decode_step, unembed

DRAFT, ACCEPT, RESAMPLE = 1, 2, 3  # the purposes of random keys


class Draft(NamedTuple):
    """Proposed tokens, -1 for none, and the logits that they were sampled from; None: their probability is 1."""

    tokens: Int[Array | np.ndarray, "batch draft"]
    logits: Float[Array, "batch draft vocab"] | None = None


@runtime_checkable
class Drafter(Protocol):
    """Proposes the next tokens of texts."""

    def start(self, requests: Sequence[Request], keys: Array | None, num_draft_tokens: int, total: int) -> None:
        """Is called once, with the texts of the batch, of at most `total` tokens."""

    def propose(self, texts: list[np.ndarray]) -> Draft:
        """A draft for the texts so far, the model's own last token included."""


@dataclass
class PromptLookup:
    """Proposes what followed the last few tokens where they occurred before (Saxena 2023). Costs nothing."""

    longest: int = 3  # tokens to search for; then fewer
    num_draft_tokens: int = field(init=False, default=0)

    def start(self, requests: Sequence[Request], keys: Array | None, num_draft_tokens: int, total: int) -> None:
        self.num_draft_tokens = num_draft_tokens

    def propose(self, texts: list[np.ndarray]) -> Draft:
        tokens = np.full((len(texts), self.num_draft_tokens), -1, np.int32)
        for row, text in enumerate(texts):
            follows = self._after_last_match(text)
            tokens[row, : len(follows)] = follows
        return Draft(tokens)

    def _after_last_match(self, text: np.ndarray) -> np.ndarray:
        for size in range(min(self.longest, len(text) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
            if len(starts := np.flatnonzero((windows == text[-size:]).all(1))):
                return text[starts[-1] + size :][: self.num_draft_tokens]
        return text[:0]


class DraftModel:
    """A smaller model with the same tokens as drafter."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def start(self, requests: Sequence[Request], keys: Array | None, num_draft_tokens: int, total: int) -> None:
        engine = self.engine
        self.config = limit_window(engine.config, total)
        self.sampling = batch_params([r.sampling for r in requests], engine.vocab_size, engine.padded_vocab_size)
        self.keys, self.num_draft_tokens = keys, num_draft_tokens
        prompts = pad_prompts([r.prompt for r in requests])
        slots = cache_length_for(engine.config, total + num_draft_tokens, num_draft_tokens + 1)
        self.cache_lengths = np.array([len(r.prompt) for r in requests])
        cache = empty_cache(self.config, len(requests), slots)
        self.cache = _prefill(engine.params, cache, prompts, config=self.config)

    def propose(self, texts: list[np.ndarray]) -> Draft:
        """First reads what is new in the texts: one token, or two if the whole last draft was accepted."""
        positions = np.array([[len(t) - 2, len(t) - 1] for t in texts])
        positions[:, 0] = np.where(positions[:, 0] >= self.cache_lengths, positions[:, 0], -1)
        draft, self.cache = _draft(
            self.engine.params, self.cache, DecodeInputs(jnp.array([t[-2:] for t in texts]), jnp.asarray(positions)),
            config=self.config, sampling=self.sampling, keys=self.keys, num_draft_tokens=self.num_draft_tokens,
        )  # fmt: skip
        self.cache_lengths = np.array([len(t) for t in texts]) + self.num_draft_tokens - 1
        return Draft(np.array(draft.tokens), draft.logits)


@partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _prefill(params: Params, cache: Cache, prompts: DecodeInputs, *, config: ModelConfig) -> Cache:
    return decode_step(config, params, *prompts, cache, prefill=True)[1]


@partial(jax.jit, static_argnames=("config", "num_draft_tokens"), donate_argnames="cache")
def _draft(
    params: Params,
    cache: Cache,
    inputs: DecodeInputs,
    *,
    config: ModelConfig,
    sampling: BatchedSamplingParams,
    keys: Key[Array, " batch"] | None,
    num_draft_tokens: int,
) -> tuple[Draft, Cache]:
    """Reads the inputs and samples a draft from the draft model."""

    def decode(cache: Cache, tokens: Array, positions: Array) -> tuple[Cache, Array, Array]:
        x, cache = decode_step(config, params, tokens, positions, cache)
        logits = process_logits(unembed(config, params, x[:, -1:])[:, 0], sampling, no_history(tokens))
        token_keys = None if keys is None else jax.vmap(purpose_key, (0, 0, None))(keys, positions[:, -1] + 1, DRAFT)
        return cache, sample_token(logits, sampling, token_keys), logits

    def body(carry: tuple[Cache, Array, Array], _: None) -> tuple[tuple[Cache, Array, Array], tuple[Array, Array]]:
        cache, token, position = carry
        cache, next_token, logits = decode(cache, token[:, None], position[:, None])
        return (cache, next_token, position + 1), (next_token, logits)

    cache, first, first_logits = decode(cache, *inputs)
    carry = (cache, first, inputs.positions[:, -1] + 1)
    (cache, _, _), (rest, rest_logits) = jax.lax.scan(body, carry, None, length=num_draft_tokens - 1)
    tokens = jnp.concatenate([first[:, None], rest.T], 1)
    logits = jnp.concatenate([first_logits[:, None], rest_logits.swapaxes(0, 1)], 1)
    return Draft(tokens, logits), cache


def purpose_key(key: Array, position: Array, purpose: int) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, position), purpose)


def no_history(tokens: Array) -> TokenHistory:
    """For sampling parameters that do not use the history."""
    zeros = jnp.zeros(len(tokens), jnp.int32)
    return TokenHistory(jnp.zeros((len(tokens), 1), jnp.int32), zeros, zeros)
