"""The maths of a GPT as pure functions of arrays; the modules declare the weights and call these.

Names of axes: B batch, Q query tokens, K key tokens, N query heads, M key/value heads, H width of a head, D any width.
Sums that lose digits (norms, softmax, cross-entropy) are taken in float32 whatever the inputs are.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gptjax import config


def layer_norm(x: Array, scale: Array, bias: Array | None, epsilon: float) -> Array:
    """Zero mean and unit variance over the last axis, then scaled and shifted (Ba et al. 2016). Keeps x's dtype."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """Unit root mean square over the last axis, then scaled (Zhang & Sennrich 2019). Keeps x's dtype."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon) * scale).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # Primer (So et al. 2021)
    "swiglu": jax.nn.silu,  # of the gate (Shazeer 2020)
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),  # of the gate
}


def softcap(x: Array, cap: float | None) -> Array:
    """`cap tanh(x / cap)`: never beyond +-cap (Gemma 2). None leaves x alone."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rope_frequencies(model: config.Model) -> tuple[Array, float]:
    """Angle per position for each pair of numbers, float32 [H / 2], and YaRN's factor on queries and keys.

    Su et al. 2021; linear: Chen et al. 2023; NTK-aware: base grown so that the slowest pair is stretched by exactly the
    factor; YaRN: Peng et al. 2023, with its beta_fast = 32, beta_slow = 1 and attention factor 0.1 ln(factor) + 1.
    """
    m = model.resolved()
    assert m.head_dim and m.rope_original_length
    half, factor = m.head_dim // 2, m.rope_factor
    exponents = jnp.arange(half, dtype=jnp.float32) / half
    if m.rope_scaling == "ntk":
        return (m.rope_base * factor ** (m.head_dim / max(1, m.head_dim - 2))) ** -exponents, 1.0
    frequencies = m.rope_base**-exponents
    if m.rope_scaling == "none":
        return frequencies, 1.0
    if m.rope_scaling == "linear":
        return frequencies / factor, 1.0

    def pair_that_turns(times: float) -> float:
        """The (fractional) index of the pair that turns this often within the original length."""
        return half * math.log(m.rope_original_length / (times * 2 * math.pi)) / math.log(m.rope_base)  # type: ignore[operator]

    low, high = max(math.floor(pair_that_turns(32)), 0), min(math.ceil(pair_that_turns(1)), m.head_dim - 1)
    slow = jnp.clip((jnp.arange(half) - low) / max(high - low, 0.001), 0, 1)
    return frequencies / factor * slow + frequencies * (1 - slow), 0.1 * math.log(factor) + 1


def rope_table(model: config.Model, positions: Array) -> tuple[Array, Array]:
    """Cosines and sines to turn queries and keys by: float32 [..., 1, H / 2] for int positions [...]."""
    frequencies, attention_factor = rope_frequencies(model)
    angles = positions[..., None, None] * frequencies
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def rotate(x: Array, table: tuple[Array, Array]) -> Array:
    """Turns the pairs (x[i], x[i + H / 2]) of [B, Q, N, H] by their angles. Keeps x's dtype."""
    cos, sin = table
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def alibi_slopes(num_heads: int) -> Array:
    """The penalty per token of distance for each head, float32 [N] (Press et al. 2022, also between powers of two)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return jnp.array(slopes, jnp.float32)


class Sight(NamedTuple):
    """What decides which keys a query may see: places in the text, and documents where they must be kept apart.

    Places are int32 [Q] and [K]; segments int32 [B, Q] and [B, K] or None.
    """

    query_places: Array
    key_places: Array
    query_segments: Array | None = None
    key_segments: Array | None = None


def visible(sight: Sight, causal: bool, window: int | None) -> Array | None:
    """True where a query sees a key: bool [B or 1, 1, Q, K]; None where everything is seen."""
    distance = sight.query_places[:, None] - sight.key_places[None, :]
    rules = []
    if causal:
        rules.append((distance >= 0)[None, None])
    if window is not None:
        rules.append((abs(distance) < window)[None, None])
    if sight.query_segments is not None and sight.key_segments is not None:
        rules.append((sight.query_segments[:, :, None] == sight.key_segments[:, None, :])[:, None])
    if not rules:
        return None
    mask = rules[0]
    for rule in rules[1:]:
        mask = mask & rule
    return mask


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None,
    bias: Array | None = None,
    cap: float | None = None,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    """Softmax attention; query [B, Q, N, H], key and value [B, K, M, H] -> [B, Q, N, H] in the query's dtype.

    M divides N: head n reads key/value head n // (N / M). `mask` is true where a key is seen, [B or 1, 1, Q, K]; a
    query that sees no key gets the mean of the values. `bias` [N, Q, K] is added to the scores, `dropout` acts on the
    weights.
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads, group = key.shape[2], num_heads // key.shape[2]
    # The queries that share a key head are rows of one matrix, so that every product is a plain batched one.
    rows = (query * head_dim**-0.5).reshape(batch, length, num_kv_heads, group, head_dim)
    rows = rows.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, group * length, head_dim)
    scores = jnp.einsum("bmrh,bmkh->bmrk", rows, key.swapaxes(1, 2), preferred_element_type=jnp.float32)
    scores = softcap(scores, cap).reshape(batch, num_heads, length, -1)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, -1)
    weights = (dropout(weights) if dropout else weights).astype(value.dtype)
    weights = weights.reshape(batch, num_kv_heads, group * length, -1)
    mixed = jnp.einsum("bmrk,bmkh->bmrh", weights, value.swapaxes(1, 2))
    return mixed.reshape(batch, num_heads, length, head_dim).swapaxes(1, 2)


def cross_entropy(logits: Array, targets: ArrayLike) -> tuple[Array, Array]:
    """Nats to name each target, and log Z, of logits [..., vocab] and int targets [...]; both float32 [...].

    The target's logit is picked by a masked sum, not by a gather, so that it works where the vocabulary is sharded.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, -1)
    is_target = jnp.arange(logits.shape[-1]) == jnp.asarray(targets)[..., None]
    return log_z - jnp.where(is_target, logits, 0).sum(-1), log_z
