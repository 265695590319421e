"""How the next token is chosen: pure functions of the logits and of the text so far.

The order is that of transformers: logit bias, repetition, presence and frequency penalties, no-repeat n-grams,
constraints; then, if tokens are sampled, temperature, top-k, top-p and min-p. Penalties count tokens as transformers
and the serving engines do: repetition in the prompt and the continuation, presence and frequency in the continuation
only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key, UInt32

from gptjax.errors import PromptError

MAX_NGRAM = 10**9
SAMPLING_BLOCK = 256  # tokens of a block in `categorical`


@dataclass(frozen=True)
class SamplingParams:
    """How the next token of one text is chosen. The defaults sample from the model's own distribution."""

    temperature: float = 1.0  # divides the logits; 0: greedy decoding
    top_k: int | None = None  # keep the k most likely tokens (and all that tie with the last of them)
    top_p: float | None = (
        None  # keep the most likely tokens that together reach this probability (Holtzman et al. 2020)
    )
    min_p: float | None = None  # keep tokens at least this many times as likely as the most likely (Nguyen et al. 2024)
    repetition_penalty: float = 1.0  # divides positive logits of tokens in the text, multiplies negative ones (CTRL)
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the continuation
    frequency_penalty: float = 0.0  # the same, once for each occurrence
    no_repeat_ngram_size: int = 0  # forbid n-grams of this size to occur twice; 0: off
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)

    def __post_init__(self) -> None:
        rules = [
            (0 <= self.temperature < math.inf, "temperature", "must be at least 0; 0 is greedy decoding"),
            (self.top_k is None or self.top_k >= 1, "top_k", "must be at least 1"),
            (self.top_p is None or 0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1"),
            (self.min_p is None or 0 <= self.min_p <= 1, "min_p", "must be at least 0 and at most 1"),
            (math.isfinite(self.presence_penalty), "presence_penalty", "must be a finite number"),
            (math.isfinite(self.frequency_penalty), "frequency_penalty", "must be a finite number"),
            (
                all(b < math.inf for _, b in self.logit_bias),
                "logit_bias",
                "must be numbers below infinity; -inf forbids",
            ),
            (0 < self.repetition_penalty < math.inf, "repetition_penalty", "must be above 0; 1 turns it off"),
            (
                0 <= self.no_repeat_ngram_size <= MAX_NGRAM,
                "no_repeat_ngram_size",
                f"must be at least 0 (off) and at most {MAX_NGRAM:,}",
            ),
        ]
        if wrong := [f"{name} = {getattr(self, name)}: {message}" for holds, name, message in rules if not holds]:
            raise PromptError("\n".join(wrong))

    @property
    def uses_history(self) -> bool:
        """Whether the choice depends on the text so far other than through the model."""
        return bool(
            self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.no_repeat_ngram_size
        )


class BatchedSamplingParams(NamedTuple):
    """The `SamplingParams` of a batch of texts; None if no text has a setting, so that it is not compiled in."""

    temperature: Float[Array, " batch"] | None
    top_k: Int[Array, " batch"] | None
    top_p: Float[Array, " batch"] | None
    min_p: Float[Array, " batch"] | None
    repetition_penalty: Float[Array, " batch"] | None
    presence_penalty: Float[Array, " batch"] | None
    frequency_penalty: Float[Array, " batch"] | None
    no_repeat_ngram_size: Int[Array, " batch"] | None
    logit_bias: Float[Array, "batch vocab"] | None  # -inf for ids that are not tokens


class TokenHistory(NamedTuple):
    """The texts so far: `tokens[b, : lengths[b]]`, of which the first `prompt_lengths[b]` are the prompt."""

    tokens: Int[Array, "batch total"]
    prompt_lengths: Int[Array, " batch"]
    lengths: Int[Array, " batch"]


def batch_params(samplings: Sequence[SamplingParams], vocab_size: int, padded_vocab_size: int) -> BatchedSamplingParams:
    """The settings of a batch of texts. Ids from `vocab_size` to `padded_vocab_size` have logits but are not tokens.

    Raises `PromptError` for a bias on an id that is not a token.
    """
    defaults = SamplingParams()

    def column(name: str, dtype: type = np.float32, if_none: float | None = None) -> Array | None:
        values = [getattr(s, name) for s in samplings]
        if all(v == getattr(defaults, name) for v in values):
            return None
        filled = np.array([if_none if v is None else v for v in values], np.float64)
        return jnp.asarray(np.minimum(filled, 1 << 30).astype(dtype))  # as good as no limit

    return BatchedSamplingParams(
        temperature=column("temperature"),
        top_k=column("top_k", np.int32, padded_vocab_size),
        top_p=column("top_p", np.float32, 1.0),
        min_p=column("min_p", np.float32, 0.0),
        repetition_penalty=column("repetition_penalty"),
        presence_penalty=column("presence_penalty"),
        frequency_penalty=column("frequency_penalty"),
        no_repeat_ngram_size=column("no_repeat_ngram_size", np.int32),
        logit_bias=_logit_bias(samplings, vocab_size, padded_vocab_size),
    )


def _logit_bias(
    samplings: Sequence[SamplingParams], vocab_size: int, padded_vocab_size: int
) -> Float[Array, "batch vocab"] | None:
    if vocab_size == padded_vocab_size and not any(s.logit_bias for s in samplings):
        return None
    bias = np.zeros((len(samplings), padded_vocab_size), np.float32)
    bias[:, vocab_size:] = -np.inf
    for row, sampling in enumerate(samplings):
        for token, value in sampling.logit_bias:
            if not 0 <= token < vocab_size:
                raise PromptError(f"logit_bias: {token} is not a token id; ids are 0 to {vocab_size - 1}")
            bias[row, token] += value
    return jnp.asarray(bias)


def process_logits(
    logits: Float[Array, "batch vocab"],
    sampling: BatchedSamplingParams,
    history: TokenHistory,
    allowed: Bool[Array, "batch vocab"] | None = None,
) -> Float[Array, "batch vocab"]:
    """The logits after everything that also applies to greedy decoding; -inf forbids a token.

    `allowed`: the tokens that the constraints permit.
    """
    if sampling.logit_bias is not None:
        logits = logits + sampling.logit_bias
    if sampling.repetition_penalty is not None:
        penalty = sampling.repetition_penalty[:, None]
        occurs = _count(history, logits.shape, with_prompt=True) > 0
        logits = jnp.where(occurs, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.presence_penalty is not None or sampling.frequency_penalty is not None:
        counts = _count(history, logits.shape, with_prompt=False)
        if sampling.presence_penalty is not None:
            logits = logits - sampling.presence_penalty[:, None] * (counts > 0)
        if sampling.frequency_penalty is not None:
            logits = logits - sampling.frequency_penalty[:, None] * counts
    if sampling.no_repeat_ngram_size is not None:
        logits = _forbid_repeated_ngrams(logits, sampling.no_repeat_ngram_size, history)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    return logits


def _count(history: TokenHistory, shape: tuple[int, ...], with_prompt: bool) -> Int[Array, "batch vocab"]:
    """How often each token occurs in each text, or in its continuation."""
    positions = jnp.arange(history.tokens.shape[1])
    counted = (positions < history.lengths[:, None]) & (with_prompt | (positions >= history.prompt_lengths[:, None]))
    rows = jnp.arange(shape[0])[:, None]
    return jnp.zeros(shape, jnp.int32).at[rows, history.tokens].add(counted.astype(jnp.int32))


def _forbid_repeated_ngrams(
    logits: Float[Array, "batch vocab"], sizes: Int[Array, " batch"], history: TokenHistory
) -> Float[Array, "batch vocab"]:
    """Forbids each token that would complete an n-gram of the row's size which the text already contains (0: none)."""
    tokens, lengths = history.tokens, history.lengths[:, None]
    positions = jnp.arange(tokens.shape[1])

    def compare(offset: Array, matches: Array) -> Array:
        """Also compares the token `offset` before each position with the token `offset` before the end."""
        last = jnp.take_along_axis(tokens, jnp.maximum(lengths - offset, 0), 1)
        equal = (jnp.roll(tokens, offset, 1) == last) & (positions >= offset)
        return matches & (equal | (offset >= sizes[:, None]))

    completes = jnp.broadcast_to((positions < lengths) & (sizes[:, None] > 0), tokens.shape)
    most = jnp.minimum(sizes.max(), tokens.shape[1] + 1)  # a longer n-gram than the text is not in it
    completes = jax.lax.fori_loop(1, most, compare, completes)
    return logits.at[jnp.arange(len(tokens))[:, None], tokens].min(jnp.where(completes, -jnp.inf, jnp.inf))


def warped(logits: Float[Array, "batch vocab"], sampling: BatchedSamplingParams) -> Float[Array, "batch vocab"]:
    """The logits to sample from: scaled by temperature, -inf for tokens that top-k, top-p or min-p remove.

    At temperature 0 only the most likely token remains.
    """
    if sampling.temperature is not None:
        is_greedy = (sampling.temperature == 0)[:, None]
        logits = logits / jnp.where(is_greedy, 1.0, sampling.temperature[:, None])
        is_best = jnp.arange(logits.shape[-1]) == argmax(logits)[:, None]
        logits = jnp.where(is_greedy & ~is_best, -jnp.inf, logits)
    if sampling.top_k is not None:
        threshold = _threshold(logits, sampling.top_k, lambda kept: kept.sum(-1))
        logits = jnp.where(_sortable(logits) >= threshold, logits, -jnp.inf)
    if sampling.top_p is not None:
        probs = jax.nn.softmax(logits, -1)
        ones = jnp.ones(logits.shape[-1])
        threshold = _threshold(logits, sampling.top_p, lambda kept: jnp.where(kept, probs, 0) @ ones)
        is_kept = _sortable(logits) >= threshold
        is_kept |= (sampling.top_p >= 1)[:, None]  # the float32 probabilities may add up to less than 1
        logits = jnp.where(is_kept, logits, -jnp.inf)
    if sampling.min_p is not None:
        min_logit = logits.max(-1, keepdims=True) + jnp.log(sampling.min_p)[:, None]
        logits = jnp.where(logits >= min_logit, logits, -jnp.inf)
    return logits


def _sortable(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """float32 as uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(
    logits: Float[Array, "batch vocab"], target: Array, measure: Callable[[Array], Array]
) -> UInt32[Array, "batch 1"]:
    """The largest x (as `_sortable`) for which the logits from x up measure at least `target` [batch].

    A binary search over the 32 bits: sorting a large vocabulary takes ten times as long on a CPU.
    """
    keys = _sortable(logits)

    def refine(i: Array, low: Array) -> Array:
        higher = low | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where((measure(keys >= higher) >= target)[:, None], higher, low)

    return jax.lax.fori_loop(0, 32, refine, jnp.zeros((len(logits), 1), jnp.uint32))


def sample_token(
    logits: Float[Array, "batch vocab"], sampling: BatchedSamplingParams, keys: Key[Array, " batch"] | None
) -> Int[Array, " batch"]:
    """A token for each row of processed logits; -1 if none is allowed. Without keys decoding is greedy."""
    tokens = argmax(logits) if keys is None else categorical(warped(logits, sampling), keys)
    return jnp.where(logits.max(-1) > -jnp.inf, tokens, -1).astype(jnp.int32)


def argmax(logits: Float[Array, "*rows vocab"]) -> Int[Array, "*rows"]:
    """`jnp.argmax` over the last axis, in a sixth of its time on a CPU: the first of the largest."""
    ids = jnp.arange(logits.shape[-1])
    return jnp.where(logits == logits.max(-1, keepdims=True), ids, len(ids) - 1).min(-1)


def categorical(logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"]) -> Int[Array, " batch"]:
    """Samples a token from the distribution of each row, with its own key. A probability of 0 is never sampled.

    Samples a block of tokens, then a token in the block, each by one uniform number: a tenth of the work of
    `jax.random.categorical`, which makes a random number for every token.
    """
    probs = jax.nn.softmax(logits, -1)
    padding = (0, -logits.shape[-1] % SAMPLING_BLOCK)
    blocks = jnp.pad(probs, ((0, 0), padding)).reshape(len(logits), -1, SAMPLING_BLOCK)
    u = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _inverse_cdf(blocks.sum(-1), u[:, 0])
    block_probs = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    return (block * SAMPLING_BLOCK + _inverse_cdf(block_probs, u[:, 1])).astype(jnp.int32)


def _inverse_cdf(weights: Float[Array, "batch n"], u: Float[Array, " batch"]) -> Int[Array, " batch"]:
    """The index in each row at which the cumulative sum of the weights exceeds the fraction u of their total."""
    sums = jnp.cumsum(weights, -1)
    exceeds = (sums > u[:, None] * sums[:, -1:]) & (weights > 0)
    last = weights.shape[-1] - 1 - (weights[:, ::-1] > 0).argmax(-1)  # if rounding leaves none
    return jnp.where(exceeds.any(-1), exceeds.argmax(-1), last)
