"""Self-attention: MHA, GQA and MQA, every kind of position, window and mask; trained whole or decoded with a cache."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from gptjax import config
from gptjax.model import matmul, ops
from gptjax.model.chunks import limit_for_backend, map_in_chunks, num_chunks, remat_if_large
from gptjax.model.weights import declare
from gptjax.sharding import constrain, largest_divisor, num_batch_devices

MAX_BLOCKS, MIN_BLOCK = 4, 128  # four save 3 of 8 scores; blocks of fewer than 128 queries cost more than they save
MAX_SCORES, MAX_SCORES_ON_GPU = 1 << 24, 1 << 28  # float32: 64 MB and 1 GB
DROPOUT_ROWS = 8  # that parts are made for where there is dropout, so that any devices make, and drop, the same


class KVCache(NamedTuple):
    """Keys and values that one layer has made of the tokens so far: [B, M, slots, H]."""

    keys: Array
    values: Array


class CacheView(NamedTuple):
    """What a layer is given to go on from: its cache, and where in it the new tokens belong."""

    layer: KVCache
    slots: Array  # int32 [B, Q]: the slot of each new token; one beyond the last is not kept
    prefill: bool = False  # nothing has been read yet, so that the new tokens see each other only


def write(cache: Array, new: Array, slots: Array) -> Array:
    """Puts new [B, Q, M, H] into the slots [B, Q] of a cache [B, M, slots, H]."""
    new = new.astype(cache.dtype).swapaxes(1, 2)
    if slots.shape[1] > 1:
        rows = jnp.arange(cache.shape[0])[:, None]
        return cache.at[rows, :, slots].set(new.swapaxes(1, 2), mode="drop")

    def write_row(row: Array, cache: Array) -> Array:
        one = jax.lax.dynamic_slice_in_dim(new, row, 1)
        return jax.lax.dynamic_update_slice(cache, one, (row, 0, slots[row, 0], 0))

    return jax.lax.fori_loop(0, cache.shape[0], write_row, cache)  # in place; a scatter of bfloat16 copies the cache


def choose_kernel(
    model: config.ModelConfig, backend: str, length: int = 0, masked: bool = False, decoding: bool = False
) -> tuple[str, str]:
    """The attention kernel that will run, "xla" or "cudnn", and why.

    `length`: of a text from which may be learnt; `masked`: more than the model's own rules says who sees whom in it.
    """
    if model.attention_kernel == "xla":
        return "xla", "asked for"
    if backend != "gpu":
        return "xla", f"on {backend}"
    head_dim, capability = model.resolved().head_dim or 0, _capability()
    widest = 256 if capability >= (9, 0) else 128
    masked = masked or model.sliding_window is not None or model.positions == "alibi"
    obstacles = [
        reason
        for obstacle, reason in [
            (model.dtype != "bfloat16", "cuDNN needs model.dtype = 'bfloat16'"),
            (model.attention_softcap is not None, "cuDNN has no soft-cap"),
            (model.dropout > 0, "attention dropout is drawn outside cuDNN"),
            (capability < (8, 0), "cuDNN needs an NVIDIA GPU of compute capability 8.0 or later"),
            (head_dim % 8 != 0, "cuDNN needs head_dim to be a multiple of 8"),
            (head_dim > widest, f"cuDNN needs head_dim to be at most {widest} on this GPU"),
            (masked and length % 2 != 0, "cuDNN needs an even context_length to learn under a mask or with ALiBi"),
            (decoding, "decoding with a cache"),
        ]
        if obstacle
    ]
    if obstacles:
        return "xla", ", ".join(obstacles)
    return "cudnn", "asked for" if model.attention_kernel == "cudnn" else "fused, on gpu"


def _capability() -> tuple[int, ...]:
    """CUDA's compute capability of the GPUs here, (9, 0) for instance; () where they are not NVIDIA's."""
    told = getattr(jax.local_devices()[0], "compute_capability", "")
    return tuple(map(int, told.split("."))) if re.fullmatch(r"\d+\.\d+", told) else ()


class Attention(nn.Module):
    """`out(attention(query(x), key(x), value(x)))` for x [B, Q, embed]."""

    config: config.ModelConfig

    def setup(self) -> None:
        m = self.config
        matrix = nn.initializers.normal(m.mup_init_std)
        joins_residual = nn.initializers.normal(
            m.mup_init_std / (m.num_residual_adds**0.5 if m.init_depth_scaled else 1)
        )
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        self.query = declare(self, "query", ("embed", "heads", "head_dim"), matrix)
        self.key = declare(self, "key", ("embed", "kv_heads", "head_dim"), matrix)
        self.value = declare(self, "value", ("embed", "kv_heads", "head_dim"), matrix)
        self.out = declare(self, "out", ("heads", "head_dim", "embed"), joins_residual)
        self.query_bias = declare(self, "query_bias", ("heads", "head_dim"), zeros) if m.bias else None
        self.key_bias = declare(self, "key_bias", ("kv_heads", "head_dim"), zeros) if m.bias else None
        self.value_bias = declare(self, "value_bias", ("kv_heads", "head_dim"), zeros) if m.bias else None
        self.out_bias = declare(self, "out_bias", ("embed",), zeros) if m.bias else None
        if m.qk_norm:
            self.query_scale = declare(self, "query_scale", ("head_dim",), ones)
            self.key_scale = declare(self, "key_scale", ("head_dim",), ones)

    def __call__(
        self, x: Array, rope: tuple[Array, Array] | None, sight: ops.AttentionMask, cache: CacheView | None = None
    ) -> tuple[Array, KVCache | None]:
        """x [B, Q, embed] -> ([B, Q, embed], the cache with the keys and values of x in their slots)."""
        m = self.config
        query, key, value = self.project(x)
        if rope is not None:
            query, key = ops.apply_rope(query, rope), ops.apply_rope(key, rope)
        query = constrain(query, "batch", "length", "heads", "head_dim")
        grown = None
        if cache is not None:
            grown = KVCache(*(write(*pair, cache.slots) for pair in zip(cache.layer, (key, value), strict=True)))
            if not cache.prefill:
                key, value = (x.swapaxes(1, 2) for x in grown)
                query = query.astype(key.dtype)
        mixed = self.attend(query, key, value, sight, cache)
        y = matmul.linear(mixed.astype(m.dtype), self.out, self.out_bias, 2)
        return constrain(y, "batch", "length", "features"), grown

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries [B, Q, N, H], keys and values [B, Q, M, H], before any position is worked in."""
        m = self.config
        query, key = matmul.linear(x, self.query, self.query_bias), matmul.linear(x, self.key, self.key_bias)
        value = matmul.linear(x, self.value, self.value_bias)
        if m.qk_norm:
            query = ops.rms_norm(query, self.query_scale, m.norm_epsilon)
            key = ops.rms_norm(key, self.key_scale, m.norm_epsilon)
        if m.mup_base_width:  # scores are divided by head_dim, not by its root; 8: as usual where heads are 64 wide
            query = query * (8 / query.shape[-1] ** 0.5)
        return query, key, value

    def attend(
        self, query: Array, key: Array, value: Array, sight: ops.AttentionMask, cache: CacheView | None
    ) -> Array:
        """Attention by the kernel that `choose_kernel` names.

        For XLA, the queries of a text that is read whole are cut into `MAX_BLOCKS`, and no block meets keys that lie
        beyond what any query of it may see.
        """
        m, length = self.config, query.shape[1]
        masked = sight.query_segments is not None or sight.key_prefix is not None
        learnt, decoding = length if cache is None else 0, cache is not None and not cache.prefill
        if choose_kernel(m, jax.default_backend(), learnt, masked, decoding)[0] == "cudnn":
            plain = m.sliding_window is None and not masked
            bias = self.bias(sight)
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                bias=None if bias is None else bias.astype(query.dtype),
                mask=None if plain else ops.visible(sight, m.causal, m.sliding_window),
                is_causal=plain and m.causal,
                implementation="cudnn",
            )
        dropout_key = self.make_rng("dropout") if m.dropout and self.has_rng("dropout") else None
        if cache is not None or not m.causal or sight.key_prefix is not None:
            return self.by_parts(query, key, value, sight, 0, dropout_key)
        blocks = largest_divisor(length, max(1, min(MAX_BLOCKS, length // MIN_BLOCK)))
        size = length // blocks
        # cut with heads before tokens, as the products want them: else every block is turned by itself
        queries, keys, values = (jnp.split(x.swapaxes(1, 2), blocks, axis=2) for x in (query, key, value))
        mixed = []
        for i in range(blocks):
            first = 0 if m.sliding_window is None else max(0, i * size - m.sliding_window + 1) // size
            part = sight.part(slice(i * size, (i + 1) * size), slice(first * size, (i + 1) * size))
            key, value = (jnp.concatenate(x[first : i + 1], axis=2).swapaxes(1, 2) for x in (keys, values))
            block = self.by_parts(queries[i].swapaxes(1, 2), key, value, part, i * size, dropout_key)
            mixed.append(block.swapaxes(1, 2))
        return jnp.concatenate(mixed, axis=2).swapaxes(1, 2)

    def by_parts(
        self, query: Array, key: Array, value: Array, sight: ops.AttentionMask, first: int, dropout_key: Array | None
    ) -> Array:
        """Attention of queries, the first of which has that number in its text.

        Scores are made again for the gradient, as many of them take more memory than all the rest of a layer. At most
        `MAX_SCORES` of them are made at once on a device: where there are more, those of some queries after the other
        (Rabe & Staats 2021). So memory grows linearly with the length of the text.
        """
        m = self.config

        def of(part: tuple[Array, Array, Array, Array | None]) -> Array:
            query, number, places, segments = part
            sees = sight._replace(query_places=places, query_segments=segments)
            factors = None
            if dropout_key is not None:
                own = jax.random.fold_in(dropout_key, number[0, 0])
                weights = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
                factors = ops.dropout(jnp.ones(weights), own, m.dropout)
            mask, bias = ops.visible(sees, m.causal, m.sliding_window), self.bias(sees)
            cap = m.attention_softcap
            return ops.attention(query, key, value, mask=mask, bias=bias, cap=cap, factors=factors)

        rows, length, num_heads, _ = query.shape
        at_once = rows / num_batch_devices() if dropout_key is None else DROPOUT_ROWS
        chunks = num_chunks(length, round(at_once * num_heads * key.shape[1]), limit_for_backend(MAX_SCORES, MAX_SCORES_ON_GPU))
        number = first + jnp.arange(length)[None]
        part = (query, number, jnp.atleast_2d(sight.query_places), sight.query_segments)
        if chunks > 1:  # places are tied to queries, as else a scan over layers keeps the masks of all parts for later
            part = jax.lax.optimization_barrier(part)
        scores = rows / num_batch_devices() * num_heads * length * key.shape[1]
        return map_in_chunks(remat_if_large(of, scores), part, chunks, axis=1)

    def bias(self, sight: ops.AttentionMask) -> Array | None:
        """What ALiBi adds to the scores: [B or 1, N, Q, K]."""
        m = self.config
        if m.positions != "alibi":
            return None
        return -ops.alibi_slopes(m.num_heads)[:, None, None] * abs(ops.distances(sight))[:, None]
