"""Token positions and what depends on them: RoPE, ALiBi, and which keys a query attends to."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from gptjax.config import ModelConfig
from gptjax.model.matmul import AnyArray

RopeTable = tuple[Float[Array, "*batch 1 half"], Float[Array, "*batch 1 half"]]  # cosines and sines


def rope_frequencies(config: ModelConfig) -> tuple[Float[Array, " half"], float]:
    """Angle per position for each rotated pair, and YaRN's factor on queries and keys.

    Su et al. 2021; linear: Chen et al. 2023; NTK-aware: theta increased so that the slowest pair is stretched by
    exactly the factor; YaRN: Peng et al. 2023, with its beta_fast = 32, beta_slow = 1 and attention factor
    0.1 ln(factor) + 1; llama3: pairs that rotate more than 4 times within the original length are unchanged, those that
    rotate less than once are stretched by the factor, with linear interpolation between (Llama 3.1).
    """
    m = config.resolved()
    assert m.head_dim and m.rope_original_length
    half = round(m.head_dim * m.partial_rotary_factor) // 2
    factor = m.rope_factor
    exponents = jnp.arange(half, dtype=jnp.float32) / half
    if m.rope_scaling == "ntk":
        return (m.rope_theta * factor ** (half / max(0.5, half - 1))) ** -exponents, 1.0
    frequencies = m.rope_theta**-exponents
    if m.rope_scaling == "none":
        return frequencies, 1.0
    if m.rope_scaling == "linear":
        return frequencies / factor, 1.0

    rotations = m.rope_original_length * frequencies / (2 * math.pi)  # of each pair within the original length
    if m.rope_scaling == "llama3":
        unchanged = jnp.clip((rotations - 1) / (4 - 1), 0, 1)
        return frequencies / factor * (1 - unchanged) + frequencies * unchanged, 1.0

    def pair_with_rotations(n: float) -> float:
        """The (fractional) index of the pair that rotates n times within the original length."""
        return half * math.log(m.rope_original_length / (n * 2 * math.pi)) / math.log(m.rope_theta)  # type: ignore[operator]

    low = max(math.floor(pair_with_rotations(32)), 0)
    high = min(math.ceil(pair_with_rotations(1)), 2 * half - 1)
    slow = jnp.clip((jnp.arange(half) - low) / max(high - low, 0.001), 0, 1)
    return frequencies / factor * slow + frequencies * (1 - slow), 0.1 * math.log(factor) + 1


def rope_table(config: ModelConfig, positions: Int[AnyArray, "*batch"]) -> RopeTable:
    """Cosines and sines of the angles that rotate queries and keys: float32."""
    frequencies, attention_factor = rope_frequencies(config)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def apply_rope(x: Float[Array, "batch length heads head_dim"], table: RopeTable) -> Array:
    """Rotates the pairs (x[i], x[i + half]) of the first 2 half numbers of each head. Keeps x's shape and dtype."""
    cos, sin = table
    rotary_dim = 2 * cos.shape[-1]
    a, b = jnp.split(x[..., :rotary_dim].astype(jnp.float32), 2, -1)
    parts = [part.astype(x.dtype) for part in (a * cos - b * sin, b * cos + a * sin)]
    if rotary_dim < x.shape[-1]:
        parts.append(x[..., rotary_dim:])
    return jnp.concatenate(parts, -1)


def alibi_slopes(num_heads: int) -> Float[Array, " heads"]:
    """The penalty per token of distance for each head, float32 (Press et al. 2022, also between powers of two)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return jnp.array(slopes, jnp.float32)


class AttentionMask(NamedTuple):
    """Which keys each query may attend to, as positions and segments in place of a [query, key] array.

    Positions count tokens in the sequence, across documents. A key at a negative position is padding. With segment ids,
    a query attends to its own document only. `key_prefix` marks keys that earlier queries may attend to as well.
    """

    query_positions: Int[Array, "*batch query"]
    key_positions: Int[Array, "*batch key"]
    query_segments: Int[Array, "batch query"] | None = None
    key_segments: Int[Array, "batch key"] | None = None
    key_prefix: Bool[Array, "batch key"] | None = None

    def slice(self, first_query: int, last_query: int, first_key: int, last_key: int) -> "AttentionMask":
        """The mask of these queries and keys; the last ones are excluded."""
        queries, keys = slice(first_query, last_query), slice(first_key, last_key)
        return AttentionMask(
            self.query_positions[..., queries],
            self.key_positions[..., keys],
            None if self.query_segments is None else self.query_segments[..., queries],
            None if self.key_segments is None else self.key_segments[..., keys],
            None if self.key_prefix is None else self.key_prefix[..., keys],
        )

    def relative_positions(self) -> Int[Array, "batch query key"]:
        """Query position minus key position; the batch size is 1 if all sequences share their positions."""
        return jnp.atleast_2d(self.query_positions)[:, :, None] - jnp.atleast_2d(self.key_positions)[:, None, :]

    def materialize(self, causal: bool, window: int | None) -> Bool[Array, "batch 1 query key"] | None:
        """True where a query attends to a key; None if every query attends to every key. The batch size may be 1."""
        distance = self.relative_positions()
        rules = []
        if causal:
            rule = distance >= 0
            if self.key_prefix is not None:
                rule = rule | self.key_prefix[:, None, :]
            rules.append(rule[:, None])
        if window is not None:
            rules.append((abs(distance) < window)[:, None])
        if self.key_positions.ndim > 1:
            rules.append((self.key_positions >= 0)[:, None, None, :])
        if self.query_segments is not None and self.key_segments is not None:
            rules.append((self.query_segments[:, :, None] == self.key_segments[:, None, :])[:, None])
        if not rules:
            return None
        mask = rules[0]
        for rule in rules[1:]:
            mask = mask & rule
        return jnp.asarray(mask)  # segments alone may be NumPy arrays
