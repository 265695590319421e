"""The maths of a GPT as pure functions of arrays; the modules declare the weights and call these.

Names of axes: B batch, Q query tokens, K key tokens, N query heads, M key/value heads, H width of a head, D any width.
Sums that lose digits (norms, softmax, cross-entropy) are taken in float32 whatever the inputs are.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gptjax import config
from gptjax.model.matmul import barrier, einsum_f32
from gptjax.sharding import row_numbers


def layer_norm(x: Array, scale: Array, bias: Array | None, epsilon: float) -> Array:
    """Zero mean and unit variance over the last axis, then scaled and shifted (Ba et al. 2016). Keeps x's dtype."""
    return _norm(epsilon, True, x, scale, bias)


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """Unit root mean square over the last axis, then scaled (Zhang & Sennrich 2019). Keeps x's dtype."""
    return _norm(epsilon, False, x, scale, None)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm(epsilon: float, centred: bool, x: Array, scale: Array, bias: Array | None) -> Array:
    """Keeps two numbers a row beside x for the gradient: what is as large as x is made again where it is needed."""
    return _norm_forward(epsilon, centred, x, scale, bias)[0]


class _Norm(NamedTuple):
    """What the gradient of a norm is made of."""

    x: Array
    mean: Array | None
    rate: Array  # 1 / the root of the variance, or of the mean square
    scale: Array
    bias: Array | None

    def normal(self) -> Array:
        """x before it is scaled and shifted: float32."""
        y = self.x.astype(jnp.float32)
        return (y if self.mean is None else y - self.mean) * self.rate


def _norm_forward(epsilon: float, centred: bool, x: Array, scale: Array, bias: Array | None) -> tuple[Array, _Norm]:
    y = x.astype(jnp.float32)
    mean = barrier(y.mean(-1, keepdims=True)) if centred else None
    variance = jnp.square(y if mean is None else y - mean).mean(-1, keepdims=True)
    kept = _Norm(x, mean, barrier(jax.lax.rsqrt(variance + epsilon)), scale, bias)
    y = kept.normal() * scale
    return (y if bias is None else y + bias).astype(x.dtype), kept


def _norm_backward(epsilon: float, centred: bool, kept: _Norm, dy: Array) -> tuple[Array, Array, Array | None]:
    dy, normal, rows = dy.astype(jnp.float32), kept.normal(), tuple(range(dy.ndim - 1))
    pull = dy * kept.scale
    dx = pull - normal * barrier((pull * normal).mean(-1, keepdims=True))
    dx = kept.rate * (dx - barrier(pull.mean(-1, keepdims=True)) if centred else dx)
    d_scale = (dy * normal).sum(rows).astype(kept.scale.dtype)
    d_bias = None if kept.bias is None else dy.sum(rows).astype(kept.bias.dtype)
    return dx.astype(kept.x.dtype), d_scale, d_bias


_norm.defvjp(_norm_forward, _norm_backward)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # Primer (So et al. 2021)
    "swiglu": jax.nn.silu,  # of the gate (Shazeer 2020)
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),  # of the gate
}


def activate(name: str, x: Array) -> Array:
    """An activation, taken in float32 and back in x's dtype; made again for its gradient, so that only x is kept."""
    return jax.checkpoint(lambda x: ACTIVATIONS[name](x.astype(jnp.float32)).astype(x.dtype))(x)


def softcap(x: Array, cap: float | None) -> Array:
    """`cap tanh(x / cap)`: never beyond +-cap (Gemma 2). None leaves x alone."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rope_frequencies(model: config.ModelConfig) -> tuple[Array, float]:
    """Angle per position for each pair of numbers that is turned, and YaRN's factor on queries and keys.

    Su et al. 2021; linear: Chen et al. 2023; NTK-aware: base grown so that the slowest pair is stretched by exactly the
    factor; YaRN: Peng et al. 2023, with its beta_fast = 32, beta_slow = 1 and attention factor 0.1 ln(factor) + 1;
    llama3: pairs that turn more than 4 times within the original length stay as they are, those that turn less than
    once are stretched by the factor, with a linear passage between (Llama 3.1).
    """
    m = model.resolved()
    assert m.head_dim and m.rope_original_length
    half, factor = round(m.head_dim * m.rope_fraction) // 2, m.rope_factor
    exponents = jnp.arange(half, dtype=jnp.float32) / half
    if m.rope_scaling == "ntk":
        return (m.rope_base * factor ** (half / max(0.5, half - 1))) ** -exponents, 1.0
    frequencies = m.rope_base**-exponents
    if m.rope_scaling == "none":
        return frequencies, 1.0
    if m.rope_scaling == "linear":
        return frequencies / factor, 1.0

    turns = m.rope_original_length * frequencies / (2 * math.pi)  # that each pair makes within the original length
    if m.rope_scaling == "llama3":
        kept = jnp.clip((turns - 1) / (4 - 1), 0, 1)
        return frequencies / factor * (1 - kept) + frequencies * kept, 1.0

    def pair_that_turns(times: float) -> float:
        """The (fractional) index of the pair that turns this often within the original length."""
        return half * math.log(m.rope_original_length / (times * 2 * math.pi)) / math.log(m.rope_base)  # type: ignore[operator]

    low, high = max(math.floor(pair_that_turns(32)), 0), min(math.ceil(pair_that_turns(1)), 2 * half - 1)
    slow = jnp.clip((jnp.arange(half) - low) / max(high - low, 0.001), 0, 1)
    return frequencies / factor * slow + frequencies * (1 - slow), 0.1 * math.log(factor) + 1


def rope_table(model: config.ModelConfig, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines to turn queries and keys by: float32 [..., 1, R / 2] for int positions [...]."""
    frequencies, attention_factor = rope_frequencies(model)
    angles = positions[..., None, None] * frequencies
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def apply_rope(x: Array, table: tuple[Array, Array]) -> Array:
    """Turns the pairs (x[i], x[i + R / 2]) of the first R numbers of [B, Q, N, H] by R / 2 angles. Keeps x's dtype."""
    cos, sin = table
    turned = 2 * cos.shape[-1]
    a, b = jnp.split(x[..., :turned].astype(jnp.float32), 2, -1)
    parts = [part.astype(x.dtype) for part in (a * cos - b * sin, b * cos + a * sin)]
    return jnp.concatenate([*parts, x[..., turned:]] if turned < x.shape[-1] else parts, -1)


def alibi_slopes(num_heads: int) -> Array:
    """The penalty per token of distance for each head, float32 [N] (Press et al. 2022, also between powers of two)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return jnp.array(slopes, jnp.float32)


class AttentionMask(NamedTuple):
    """What decides which keys a query may see: places in the text, and documents where they must be kept apart.

    Places are int32 [Q] and [K], or [B, Q] and [B, K]; a key at a negative place is none. Segments are int32 [B, Q] and
    [B, K] or None. `key_prefix`, bool [B, K] or None, is true for keys that queries before them see as well.
    """

    query_places: Array
    key_places: Array
    query_segments: Array | None = None
    key_segments: Array | None = None
    key_prefix: Array | None = None

    def part(self, queries: slice, keys: slice) -> "AttentionMask":
        """Of some queries and keys only."""

        def of(x: Array | None, which: slice) -> Array | None:
            return None if x is None else x[..., which]

        return AttentionMask(
            self.query_places[..., queries],
            self.key_places[..., keys],
            of(self.query_segments, queries),
            of(self.key_segments, keys),
            of(self.key_prefix, keys),
        )


def distances(sight: AttentionMask) -> Array:
    """How far each query stands after each key: int32 [B or 1, Q, K]."""
    return jnp.atleast_2d(sight.query_places)[:, :, None] - jnp.atleast_2d(sight.key_places)[:, None, :]


def visible(sight: AttentionMask, causal: bool, window: int | None) -> Array | None:
    """True where a query sees a key: bool [B or 1, 1, Q, K]; None where everything is seen."""
    distance = distances(sight)
    rules = []
    if causal:
        known = distance >= 0
        known = known if sight.key_prefix is None else known | sight.key_prefix[:, None, :]
        rules.append(known[:, None])
    if window is not None:
        rules.append((abs(distance) < window)[:, None])
    if sight.key_places.ndim > 1:
        rules.append((sight.key_places >= 0)[:, None, None, :])
    if sight.query_segments is not None and sight.key_segments is not None:
        rules.append((sight.query_segments[:, :, None] == sight.key_segments[:, None, :])[:, None])
    if not rules:
        return None
    mask = rules[0]
    for rule in rules[1:]:
        mask = mask & rule
    return mask


def dropout(x: Array, key: Array, rate: float) -> Array:
    """Zeroes a share of x [rows, ..., features] and scales the rest up, so that the mean stays.

    A byte decides each element, as in FlashAttention: the share is `rate` to the nearest 1/256, and the scale is exact
    for that. Random numbers of 32 bits would cost as much as the rest of attention on a CPU. Each row has a key of its
    own, so that it loses the same elements on whichever core it is.
    """
    keys = jax.vmap(partial(jax.random.fold_in, key))(row_numbers(x.shape[0]))
    words = jax.vmap(lambda key: jax.random.bits(key, (*x.shape[1:-1], -(-x.shape[-1] // 4)), jnp.uint32))(keys)
    drawn = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    dropped = round(rate * 256)
    return jnp.where(drawn >= dropped, x * (256 / (256 - dropped)), jnp.zeros_like(x))


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None,
    bias: Array | None = None,
    cap: float | None = None,
    factors: Array | None = None,
) -> Array:
    """Softmax attention; query [B, Q, N, H], key and value [B, K, M, H] -> [B, Q, N, H] in the query's dtype.

    M divides N: head n reads key/value head n // (N / M). `mask` is true where a key is seen, [B or 1, 1, Q, K]; a
    query that sees no key gets the mean of the values. `bias` [B or 1, N, Q, K] is added to the scores, and the weights
    are multiplied by `factors` [B, N, Q, K] (dropout), which have no gradient.
    """
    return _attend(cap, query, key, value, _Seen(mask, bias, factors))


class _Seen(NamedTuple):
    """What `attention` is told of the keys that a query sees."""

    mask: Array | None
    bias: Array | None
    factors: Array | None

    def shown(self, scores: Array) -> Array:
        """Those that count among the scores [B, N, Q, K]."""
        scores = scores if self.bias is None else scores + self.bias
        return scores if self.mask is None else jnp.where(self.mask, scores, jnp.finfo(jnp.float32).min)

    def weighed(self, weights: Array) -> Array:
        """The weights [B, N, Q, K], or a gradient of theirs, with what dropout does to them."""
        return weights if self.factors is None else weights * self.factors


class _Attended(NamedTuple):
    """What the gradient of attention is made of."""

    query: Array
    key: Array
    value: Array
    seen: _Seen
    weights: Array  # e^(score - largest score of the row), [B, N, Q, K]
    total: Array  # their sum, [B, N, Q, 1]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(cap: float | None, query: Array, key: Array, value: Array, seen: _Seen) -> Array:
    """The weights are divided by their sum after the product with the values, which has fewer numbers than they are.

    So are their gradients, as in FlashAttention (Dao et al. 2022): half the passes over [B, N, Q, K].
    """
    return _attend_forward(cap, query, key, value, seen)[0]


def _attend_forward(cap: float | None, query: Array, key: Array, value: Array, seen: _Seen) -> tuple[Array, _Attended]:
    scores = seen.shown(_scores(cap, query, key))
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    mixed = _mix(seen.weighed(weights).astype(value.dtype), value) / total
    return mixed.astype(query.dtype).swapaxes(1, 2), _Attended(query, key, value, seen, weights, total)


def _attend_backward(cap: float | None, kept: _Attended, d_mixed: Array) -> tuple[Array | _Seen, ...]:
    query, key, value, seen, weights, total = kept
    _, to_weights = jax.vjp(_mix, seen.weighed(weights).astype(value.dtype), value)
    d_weights, d_value = to_weights(d_mixed.swapaxes(1, 2).astype(jnp.float32) / total)
    d_weights = seen.weighed(d_weights.astype(jnp.float32))
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True) / total)
    if seen.mask is not None:
        d_scores = jnp.where(seen.mask, d_scores, 0)
    _, to_factors = jax.vjp(partial(_scores, cap), query, key)
    d_bias = None
    if seen.bias is not None:
        _, to_bias = jax.vjp(lambda bias: jnp.broadcast_to(bias.astype(jnp.float32), d_scores.shape), seen.bias)
        (d_bias,) = to_bias(d_scores)
    return *to_factors(d_scores), d_value, _Seen(None, d_bias, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(cap: float | None, query: Array, key: Array) -> Array:
    """[B, Q, N, H] with [B, K, M, H] -> float32 [B, N, Q, K].

    The queries that share a key head are rows of one matrix, so that every product is a plain batched one.
    """
    query, key = (query * query.shape[-1] ** -0.5).swapaxes(1, 2), key.swapaxes(1, 2)
    rows = query.reshape(*key.shape[:2], -1, query.shape[-1])
    scores = einsum_f32("bmrh,bmkh->bmrk", rows, key, jnp.float32)
    return softcap(scores, cap).reshape(*query.shape[:3], -1)


def _mix(weights: Array, value: Array) -> Array:
    """[B, N, Q, K] with [B, K, M, H] -> float32 [B, N, Q, H]."""
    value = value.swapaxes(1, 2)
    rows = weights.reshape(*value.shape[:2], -1, weights.shape[-1])
    return einsum_f32("bmrk,bmkh->bmrh", rows, value, jnp.float32).reshape(*weights.shape[:3], -1)


def cross_entropy(logits: Array, targets: ArrayLike) -> tuple[Array, Array]:
    """Nats to name each target, and log Z, of logits [..., vocab] and int targets [...]; both float32 [...].

    The target's logit is picked by a masked sum, not by a gather, so that it works where the vocabulary is sharded.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, -1)
    is_target = jnp.arange(logits.shape[-1]) == jnp.asarray(targets)[..., None]
    return log_z - jnp.where(is_target, logits, 0).sum(-1), log_z
