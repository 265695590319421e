"""Generates texts in a batch: one call reads the prompts, then one compiled step adds a token to every text.

Lengths are rounded up by `cache.bucket`. A program is compiled for each batch size, bucket of prompt lengths, bucket of
total lengths and set of sampling parameters in use, but never for a single token or value.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from gptjax.config import ModelConfig
from gptjax.errors import PromptError
from gptjax.inference.cache import bucket, cache_length_for, empty_cache, is_unbounded, limit_window
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import (
    BatchedSamplingParams,
    SamplingParams,
    TokenHistory,
    batch_params,
    process_logits,
    sample_token,
)
from gptjax.model.gpt import Cache, Params, decode_step, unembed

MAX_NEW_TOKENS = 1 << 24  # of one text


@runtime_checkable
class TokenConstraint(Protocol):
    """Follows one text, and restricts or ends it: stop tokens, stop strings, a grammar."""

    def allowed(self) -> np.ndarray | None:
        """The tokens that may come next, bool [vocab]. None: any; it must then return None for the rest of the text."""

    def accept(self, token: int) -> bool:
        """Is called with every token of the text. Returns whether the text ends with this token."""


@dataclass(frozen=True)
class Request:
    """One text to generate."""

    prompt: np.ndarray  # int32 ids, at least one
    new_tokens: int  # at most
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0  # the same seed gives the same text, whatever else is in the batch
    copy: int = 0  # different for the texts of one prompt and seed
    constraints: tuple[TokenConstraint, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Step:
    """The tokens of one decoding step."""

    tokens: np.ndarray  # int32 [texts]
    logprobs: np.ndarray  # float32 [texts]: the token's log-probability under the model, before sampling parameters
    live: np.ndarray  # bool [texts]: whether the token belongs to the text, which had not finished before
    finished: np.ndarray  # bool [texts]: whether a constraint ended the text with this token


class DecodeInputs(NamedTuple):
    """The tokens of one decoding step, and their positions; -1 for the padding, which comes last."""

    tokens: Int[Array, "batch query"]
    positions: Int[Array, "batch query"]


class DecoderState(NamedTuple):
    """The cache, and the texts so far."""

    cache: Cache
    history: TokenHistory


def check_requests(engine: Engine, requests: Sequence[Request]) -> int:
    """The total length of the longest text. Raises `PromptError` for a request that the model cannot serve."""
    context = engine.config.context_length
    for r in requests:
        length = len(r.prompt)
        if length == 0:
            raise PromptError("the prompt is empty; give at least one token")
        if not 0 <= r.prompt.min() <= r.prompt.max() < engine.vocab_size:
            raise PromptError(f"the prompt contains ids that are not tokens; ids are 0 to {engine.vocab_size - 1}")
        if not 0 <= r.seed < 2**63:
            raise PromptError(f"seed = {r.seed}: must be at least 0 and below 2**63")
        if not 0 <= r.new_tokens <= MAX_NEW_TOKENS:
            raise PromptError(f"{r.new_tokens} new tokens: must be at least 0 and at most {MAX_NEW_TOKENS:,}")
        if length + r.new_tokens > context and not is_unbounded(engine.config):
            hint = f" or generate at most {context - length} tokens" if context > length else ""
            raise PromptError(
                f"{length} prompt tokens and {r.new_tokens} new tokens are more than the model's context length of "
                f"{context}; shorten the prompt{hint}"
            )
    return max(len(r.prompt) + r.new_tokens for r in requests)


def generate(engine: Engine, requests: Sequence[Request]) -> Iterator[Step]:
    """Yields a token for every text until all are finished. Raises `PromptError` before anything is computed."""
    total = check_requests(engine, requests)
    rows = pad_to_two_rows(engine, requests)
    sampling = batch_params([r.sampling for r in rows], engine.vocab_size, engine.padded_vocab_size)
    return _generate_loop(engine, requests, rows, sampling, total)


def _generate_loop(
    engine: Engine, requests: Sequence[Request], rows: Sequence[Request], sampling: BatchedSamplingParams, total: int
) -> Iterator[Step]:
    num_texts = len(requests)
    remaining = np.array([r.new_tokens for r in requests])
    if not remaining.any():
        return
    prompts = pad_prompts([r.prompt for r in rows])
    cache = empty_cache(engine.config, len(rows), cache_length_for(engine.config, total))
    state = DecoderState(cache, start_history(prompts, total))
    decode = partial(
        _decode_and_sample, engine.params, config=limit_window(engine.config, total), sampling=sampling,
        keys=row_keys(rows),
    )  # fmt: skip

    def allowed() -> np.ndarray | None:
        mask = allowed_tokens(requests, engine.padded_vocab_size)
        return mask if mask is None else np.resize(mask, (len(rows), engine.padded_vocab_size))

    live, mask = remaining > 0, allowed()
    step = decode(state, prompts, mask)
    while True:
        token, logprob, state = step
        more = (remaining > live).any()
        if more and mask is None:  # starts the next step before this one is fetched, so that the device never waits
            step = decode(state, None, None)
        tokens = np.array(token)[:num_texts]
        if (stuck := np.flatnonzero(live & (tokens < 0))).size:
            raise PromptError(f"text {stuck[0]}: the sampling parameters and constraints allow no token; relax them")
        finished = update_constraints(requests, tokens, live)
        yield Step(tokens, np.array(logprob)[:num_texts], live, finished)
        remaining = remaining - live
        live = live & ~finished & (remaining > 0)
        if not live.any():
            return
        if mask is not None:
            mask = allowed()
            step = decode(state, None, mask)


@partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _decode_and_sample(
    params: Params,
    state: DecoderState,
    prompts: DecodeInputs | None,
    allowed: Bool[Array, "batch vocab"] | None,
    *,
    config: ModelConfig,
    sampling: BatchedSamplingParams,
    keys: Key[Array, " batch"] | None,
) -> tuple[Int[Array, " batch"], Float[Array, " batch"], DecoderState]:
    """Reads the prompts, or the last token of each text, and samples the next token: tokens, log-probabilities."""
    cache, history = state
    if prompts is None:
        last = jnp.minimum(history.lengths, history.tokens.shape[1])[:, None] - 1  # a finished text may be too long
        inputs = DecodeInputs(jnp.take_along_axis(history.tokens, last, 1), last)
    else:
        inputs = prompts
    logits, cache = next_token_logits(config, params, inputs, cache, prefill=prompts is not None)
    tokens = sample_token(process_logits(logits, sampling, history, allowed), sampling, keys_at(keys, history.lengths))
    history = append_tokens(history, tokens[:, None], jnp.ones(len(tokens), jnp.int32))
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(tokens, 0)[:, None], 1)[:, 0]
    return tokens, logprobs, DecoderState(cache, history)


def next_token_logits(
    config: ModelConfig, params: Params, inputs: DecodeInputs, cache: Cache, prefill: bool
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """The logits after the last token of each row, and the new cache."""
    x, cache = decode_step(config, params, inputs.tokens, inputs.positions, cache, prefill)
    last = (inputs.positions >= 0).sum(1) - 1
    return unembed(config, params, jnp.take_along_axis(x, last[:, None, None], 1))[:, 0], cache


def pad_to_two_rows(engine: Engine, requests: Sequence[Request]) -> list[Request]:
    """Repeats a single text where that is faster: low-precision matmuls of one row are the slowest on a CPU."""
    if len(requests) == 1 and engine.low_precision and jax.default_backend() == "cpu":
        return [*requests, *requests]
    return list(requests)


def pad_prompts(prompts: Sequence[np.ndarray]) -> DecodeInputs:
    """Prompts of any lengths as one array, padded at the end to a bucket."""
    width = bucket(max(map(len, prompts)))
    tokens = np.zeros((len(prompts), width), np.int32)
    positions = np.full((len(prompts), width), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        positions[row, : len(prompt)] = np.arange(len(prompt))
    return DecodeInputs(jnp.asarray(tokens), jnp.asarray(positions))


def allowed_tokens(requests: Sequence[Request], padded_vocab_size: int) -> np.ndarray | None:
    """The tokens that all constraints of each text allow, bool [texts, vocab]; None if no text is constrained."""
    masks = [[m for c in r.constraints if (m := c.allowed()) is not None] for r in requests]
    if not any(masks):
        return None
    allowed = np.zeros((len(requests), padded_vocab_size), bool)
    for row, row_masks in enumerate(masks):
        if row_masks:
            allowed[row, : len(row_masks[0])] = np.all(row_masks, 0)
        else:
            allowed[row] = True
    return allowed


def update_constraints(requests: Sequence[Request], tokens: np.ndarray, live: np.ndarray) -> np.ndarray:
    """Passes the token of every live text to its constraints. Returns which texts end with it, bool [texts]."""
    finished = np.zeros(len(requests), bool)
    for i in map(int, np.flatnonzero(live)):
        finished[i] = any([c.accept(int(tokens[i])) for c in requests[i].constraints])  # a list: all are called
    return finished


def start_history(prompts: DecodeInputs, total: int) -> TokenHistory:
    """The prompts, with space for texts of `total` tokens."""
    tokens = np.asarray(prompts.tokens)
    lengths = np.asarray(prompts.positions).max(1) + 1
    padded = np.zeros((len(tokens), max(bucket(total), tokens.shape[1])), np.int32)
    padded[:, : tokens.shape[1]] = tokens
    return TokenHistory(jnp.asarray(padded), jnp.asarray(lengths), jnp.asarray(lengths))


def append_tokens(history: TokenHistory, tokens: Int[Array, "batch new"], count: Int[Array, " batch"]) -> TokenHistory:
    """Appends the first `count` tokens of each row to its text."""
    index = jnp.arange(tokens.shape[1])
    in_text = index < count[:, None]
    positions = jnp.where(in_text, history.lengths[:, None] + index, history.tokens.shape[1])
    rows = jnp.arange(len(tokens))[:, None]
    written = history.tokens.at[rows, positions].set(jnp.maximum(tokens, 0), mode="drop")
    return TokenHistory(written, history.prompt_lengths, history.lengths + count)


def row_keys(requests: Sequence[Request]) -> Key[Array, " batch"] | None:
    """A random key for each text, from its seed and copy alone; None if all are decoded greedily."""
    if all(r.sampling.temperature == 0 for r in requests):
        return None
    keys = [  # two folds: a key takes only 32 bits of a seed
        jax.random.fold_in(jax.random.fold_in(jax.random.key(r.seed & 0xFFFFFFFF), r.seed >> 32), r.copy)
        for r in requests
    ]
    return jnp.stack(keys)


def keys_at(keys: Key[Array, " batch"] | None, positions: Int[Array, " batch"]) -> Key[Array, " batch"] | None:
    """The keys of the tokens at these positions."""
    return None if keys is None else jax.vmap(jax.random.fold_in)(keys, positions)
