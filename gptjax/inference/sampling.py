"""The rules by which the next token is chosen: each a pure function of logits and of the text so far.

Their order is that of transformers: logit bias, repetition, presence and frequency penalties, no-repeat n-grams, what a
grammar allows; then, where a token is drawn, temperature, top-k, top-p and min-p. Penalties count as transformers and
the serving engines do: repetition over prompt and continuation, presence and frequency over the continuation only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.errors import PromptError


@dataclass(frozen=True)
class SamplingParams:
    """How the next token of one text is drawn. The defaults leave the model's own distribution alone."""

    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token
    top_k: int | None = None  # only the k likeliest (and any that tie with the last of them)
    top_p: float | None = None  # only the likeliest that together hold this much probability (Holtzman et al. 2020)
    min_p: float | None = None  # only those at least this many times as likely as the likeliest (Nguyen et al. 2024)
    repetition_penalty: float = 1.0  # divides positive logits of tokens in the text, multiplies negative ones (CTRL)
    presence_penalty: float = 0.0  # taken off the logits of tokens that were made already
    frequency_penalty: float = 0.0  # taken off as often as the token was made
    no_repeat_ngram_size: int = 0  # no run of this many tokens occurs twice; 0: any may
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)

    def __post_init__(self) -> None:
        rules = [
            (0 <= self.temperature < math.inf, "temperature", "must not be negative; 0 takes the likeliest token"),
            (self.top_k is None or self.top_k >= 1, "top_k", "must be at least 1"),
            (self.top_p is None or 0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1"),
            (self.min_p is None or 0 <= self.min_p <= 1, "min_p", "must be at least 0 and at most 1"),
            (math.isfinite(self.presence_penalty), "presence_penalty", "must be a finite number"),
            (math.isfinite(self.frequency_penalty), "frequency_penalty", "must be a finite number"),
            (not any(math.isnan(b) for _, b in self.logit_bias), "logit_bias", "must be numbers"),
            (
                0 < self.repetition_penalty < math.inf,
                "repetition_penalty",
                "must be above 0; 1 leaves repetitions alone",
            ),
            (self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size", "must not be negative; 0 lets any repeat"),
        ]
        if wrong := [f"{name} = {getattr(self, name)}: {message}" for holds, name, message in rules if not holds]:
            raise PromptError("\n".join(wrong))

    @property
    def remembers(self) -> bool:
        """Whether a choice depends on the text so far, beyond what the model makes of it."""
        return bool(
            self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.no_repeat_ngram_size
        )


class BatchedSamplingParams(NamedTuple):
    """The settings of several texts, [B] each; None where no text has that rule, so that it is not compiled in."""

    temperature: Array | None
    top_k: Array | None
    top_p: Array | None
    min_p: Array | None
    repetition_penalty: Array | None
    presence_penalty: Array | None
    frequency_penalty: Array | None
    no_repeat_ngram_size: Array | None
    logit_bias: Array | None  # float32 [B, vocab]; -inf where an id is no token


class TokenHistory(NamedTuple):
    """What has been written: `tokens[b, : lengths[b]]`, of which the first `prompts[b]` were given."""

    tokens: Array  # int32 [B, T]
    prompts: Array  # int32 [B]
    lengths: Array  # int32 [B]


def batch_params(samplings: Sequence[SamplingParams], vocab: int, rows: int) -> BatchedSamplingParams:
    """The rules of texts whose model has logits for `rows` ids, of which the first `vocab` are tokens.

    Raises `PromptError` for a bias on an id that is no token.
    """
    plain = SamplingParams()

    def column(name: str, dtype: type = np.float32, absent: float | None = None) -> Array | None:
        values = [getattr(s, name) for s in samplings]
        if all(v == getattr(plain, name) for v in values):
            return None
        given = np.array([absent if v is None else v for v in values], np.float64)
        return jnp.asarray(np.minimum(given, 1 << 30).astype(dtype))  # as good as without a limit

    bias = None
    if vocab < rows or any(s.logit_bias for s in samplings):
        dense = np.zeros((len(samplings), rows), np.float32)
        dense[:, vocab:] = -np.inf  # rows that pad the table are no tokens
        for row, sampling in enumerate(samplings):
            for token, value in sampling.logit_bias:
                if not 0 <= token < vocab:
                    raise PromptError(f"logit_bias: {token} is no token; there are ids 0 to {vocab - 1}")
                dense[row, token] += value
        bias = jnp.asarray(dense)
    return BatchedSamplingParams(
        temperature=column("temperature"),
        top_k=column("top_k", np.int32, rows),
        top_p=column("top_p", np.float32, 1.0),
        min_p=column("min_p", np.float32, 0.0),
        repetition_penalty=column("repetition_penalty"),
        presence_penalty=column("presence_penalty"),
        frequency_penalty=column("frequency_penalty"),
        no_repeat_ngram_size=column("no_repeat_ngram_size", np.int32),
        logit_bias=bias,
    )


def penalised(
    logits: Array, rules: BatchedSamplingParams, history: TokenHistory, allowed: Array | None = None
) -> Array:
    """Logits [B, V] after every rule that also holds where the likeliest token is taken; -inf forbids a token.

    `allowed` [B, V] is true for what a grammar lets follow.
    """
    shape = logits.shape
    if rules.logit_bias is not None:
        logits = logits + rules.logit_bias
    if rules.repetition_penalty is not None:
        penalty = rules.repetition_penalty[:, None]
        seen = _count(history, shape, from_prompt=True) > 0
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if rules.presence_penalty is not None or rules.frequency_penalty is not None:
        made = _count(history, shape, from_prompt=False)
        if rules.presence_penalty is not None:
            logits = logits - rules.presence_penalty[:, None] * (made > 0)
        if rules.frequency_penalty is not None:
            logits = logits - rules.frequency_penalty[:, None] * made
    if rules.no_repeat_ngram_size is not None:
        logits = _without_repeats(logits, rules.no_repeat_ngram_size, history)
    return logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)


def _count(history: TokenHistory, shape: tuple[int, ...], from_prompt: bool) -> Array:
    """How often each token was written, int32 [B, V]."""
    places = jnp.arange(history.tokens.shape[1])
    counted = (places < history.lengths[:, None]) & (from_prompt | (places >= history.prompts[:, None]))
    rows = jnp.arange(shape[0])[:, None]
    return jnp.zeros(shape, jnp.int32).at[rows, history.tokens].add(counted.astype(jnp.int32))


def _without_repeats(logits: Array, sizes: Array, history: TokenHistory) -> Array:
    """Forbids each token that would close a run of `sizes` tokens that the text already has (0: none)."""
    tokens, lengths = history.tokens, history.lengths[:, None]
    places = jnp.arange(tokens.shape[1])

    def compare(back: Array, same: Array) -> Array:
        """Whether also the token this far before each place is the one this far before the end."""
        last = jnp.take_along_axis(tokens, jnp.maximum(lengths - back, 0), 1)
        equal = (jnp.roll(tokens, back, 1) == last) & (places >= back)
        return same & (equal | (back >= sizes[:, None]))

    closes = jnp.broadcast_to((places < lengths) & (sizes[:, None] > 0), tokens.shape)
    closes = jax.lax.fori_loop(1, sizes.max(), compare, closes)
    return logits.at[jnp.arange(len(tokens))[:, None], tokens].min(jnp.where(closes, -jnp.inf, jnp.inf))


def warped(logits: Array, rules: BatchedSamplingParams) -> Array:
    """Logits [B, V] to draw from: scaled by temperature, -inf where top-k, top-p or min-p forbid a token.

    A text of temperature 0 keeps its likeliest token only.
    """
    if rules.temperature is not None:
        cold = (rules.temperature == 0)[:, None]
        logits = logits / jnp.where(cold, 1.0, rules.temperature[:, None])
        best = jnp.arange(logits.shape[-1]) == likeliest(logits)[:, None]
        logits = jnp.where(cold & ~best, -jnp.inf, logits)
    if rules.top_k is not None:
        least = _largest(logits, rules.top_k, lambda kept: kept.sum(-1))
        logits = jnp.where(_sortable(logits) >= least, logits, -jnp.inf)
    if rules.top_p is not None:
        probabilities = jax.nn.softmax(logits, -1)
        ones = jnp.ones(logits.shape[-1])
        least = _largest(logits, rules.top_p, lambda kept: jnp.where(kept, probabilities, 0) @ ones)
        within = (_sortable(logits) >= least) | (rules.top_p >= 1)[:, None]  # many float32 may add up to less than 1
        logits = jnp.where(within, logits, -jnp.inf)
    if rules.min_p is not None:
        least = logits.max(-1, keepdims=True) + jnp.log(rules.min_p)[:, None]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def _sortable(x: Array) -> Array:
    """float32 as uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(values: Array, need: Array, measure: Callable[[Array], Array]) -> Array:
    """The largest x (as `_sortable`) for which the values [B, V] from x up measure at least `need` [B]: [B, 1].

    Found bit by bit: 32 passes, where a sort of a large vocabulary costs ten times as much on a CPU.
    """
    keys = _sortable(values)

    def refine(i: Array, least: Array) -> Array:
        higher = least | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where((measure(keys >= higher) >= need)[:, None], higher, least)

    return jax.lax.fori_loop(0, 32, refine, jnp.zeros((len(values), 1), jnp.uint32))


def choose(logits: Array, rules: BatchedSamplingParams, keys: Array | None) -> Array:
    """A token for each row of penalised logits [B, V]: int32 [B]; -1 where none is allowed.

    Drawn with a random key for each row; without keys every text takes its likeliest token.
    """
    chosen = likeliest(logits) if keys is None else draw(warped(logits, rules), keys)
    return jnp.where(logits.max(-1) > -jnp.inf, chosen, -1).astype(jnp.int32)


def likeliest(logits: Array) -> Array:
    """The first of the largest of each row [..., V]: what `argmax` finds, in a sixth of its time on a CPU."""
    ids = jnp.arange(logits.shape[-1])
    return jnp.where(logits == logits.max(-1, keepdims=True), ids, len(ids) - 1).min(-1)


def draw(logits: Array, keys: Array) -> Array:
    """A token from the distribution of each row [B, V], with a key of its own: int32 [B].

    First a block of tokens, then a token in it, each by one uniform number: a tenth of the work of a Gumbel for every
    token. What has no probability is never drawn.
    """
    width = 256
    probabilities = jax.nn.softmax(logits, -1)
    blocks = jnp.pad(probabilities, ((0, 0), (0, -logits.shape[-1] % width))).reshape(len(logits), -1, width)
    u = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _first_above(blocks.sum(-1), u[:, 0])
    within = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    return (block * width + _first_above(within, u[:, 1])).astype(jnp.int32)


def _first_above(weights: Array, u: Array) -> Array:
    """The index in each row [B, N] at which the running sum of weights passes the share u [B] of the whole."""
    sums = jnp.cumsum(weights, -1)
    passed = (sums > u[:, None] * sums[:, -1:]) & (weights > 0)
    last = weights.shape[-1] - 1 - (weights[:, ::-1] > 0).argmax(-1)  # where rounding leaves none
    return jnp.where(passed.any(-1), passed.argmax(-1), last)
