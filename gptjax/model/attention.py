"""Self-attention: MHA, GQA and MQA with every kind of position, window and mask, in training and with a KV cache."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Int

from gptjax.config import ModelConfig
from gptjax.model import matmul, ops
from gptjax.model.chunks import map_in_chunks, num_chunks, remat_if_large
from gptjax.model.kernels import choose_kernel, limit_for_backend
from gptjax.model.positions import AttentionMask, RopeTable, alibi_slopes, apply_rope
from gptjax.model.weights import declare
from gptjax.sharding import constrain, largest_divisor, num_batch_devices

MAX_BLOCKS, MIN_BLOCK = 4, 128  # four skip 3 of 8 scores; blocks of fewer than 128 queries cost more than they save
MAX_SCORES, MAX_SCORES_ON_GPU = 1 << 24, 1 << 28  # float32: 64 MB and 1 GB
DROPOUT_ROWS = 8  # rows that the chunks of dropout are sized for, so that they do not depend on the devices


class KVCache(NamedTuple):
    """Keys and values of one layer."""

    keys: Float[Array, "batch kv_heads slots head_dim"]
    values: Float[Array, "batch kv_heads slots head_dim"]


class CacheView(NamedTuple):
    """The cache of one layer, and where the new tokens go."""

    layer: KVCache
    slots: Int[Array, "batch query"]  # the slot of each new token; tokens with a slot beyond the last are not stored
    prefill: bool = False  # the cache is empty, so the new tokens attend only to each other


def write(
    cache: Float[Array, "batch kv_heads slots head_dim"],
    new: Float[Array, "batch query kv_heads head_dim"],
    slots: Int[Array, "batch query"],
) -> Float[Array, "batch kv_heads slots head_dim"]:
    """The cache with new keys or values in these slots."""
    new = new.astype(cache.dtype).swapaxes(1, 2)
    if slots.shape[1] > 1:
        rows = jnp.arange(cache.shape[0])[:, None]
        return cache.at[rows, :, slots].set(new.swapaxes(1, 2), mode="drop")

    def write_row(row: Array, cache: Array) -> Array:
        one = jax.lax.dynamic_slice_in_dim(new, row, 1)
        return jax.lax.dynamic_update_slice(cache, one, (row, 0, slots[row, 0], 0))

    return jax.lax.fori_loop(0, cache.shape[0], write_row, cache)  # in place; a scatter of bfloat16 copies the cache


class Attention(nn.Module):
    """`out(attention(query(x), key(x), value(x)))`."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        matrix = nn.initializers.normal(config.mup_init_std)
        out_std = config.mup_init_std / (config.num_residual_adds**0.5 if config.init_depth_scaled else 1)
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        self.query = declare(self, "query", ("embed", "heads", "head_dim"), matrix)
        self.key = declare(self, "key", ("embed", "kv_heads", "head_dim"), matrix)
        self.value = declare(self, "value", ("embed", "kv_heads", "head_dim"), matrix)
        self.out = declare(self, "out", ("heads", "head_dim", "embed"), nn.initializers.normal(out_std))
        self.query_bias = declare(self, "query_bias", ("heads", "head_dim"), zeros) if config.bias else None
        self.key_bias = declare(self, "key_bias", ("kv_heads", "head_dim"), zeros) if config.bias else None
        self.value_bias = declare(self, "value_bias", ("kv_heads", "head_dim"), zeros) if config.bias else None
        self.out_bias = declare(self, "out_bias", ("embed",), zeros) if config.bias else None
        if config.qk_norm:
            self.query_scale = declare(self, "query_scale", ("head_dim",), ones)
            self.key_scale = declare(self, "key_scale", ("head_dim",), ones)

    def __call__(
        self,
        x: Float[Array, "batch query embed"],
        rope: RopeTable | None,
        mask: AttentionMask,
        cache: CacheView | None = None,
    ) -> tuple[Float[Array, "batch query embed"], KVCache | None]:
        """The output, and the cache with the keys and values of x in their slots."""
        query, key, value = self.project_qkv(x)
        if rope is not None:
            query, key = apply_rope(query, rope), apply_rope(key, rope)
        query = constrain(query, "batch", "length", "heads", "head_dim")
        new_cache = None
        if cache is not None:
            keys, values = cache.layer
            new_cache = KVCache(write(keys, key, cache.slots), write(values, value, cache.slots))
            if not cache.prefill:
                key, value = (x.swapaxes(1, 2) for x in new_cache)
                query = query.astype(key.dtype)
        y = self.attend(query, key, value, mask, cache)
        y = matmul.linear(y.astype(self.config.dtype), self.out, self.out_bias, 2)
        return constrain(y, "batch", "length", "features"), new_cache

    def project_qkv(
        self, x: Float[Array, "batch query embed"]
    ) -> tuple[
        Float[Array, "batch query heads head_dim"],
        Float[Array, "batch query kv_heads head_dim"],
        Float[Array, "batch query kv_heads head_dim"],
    ]:
        """Queries, keys and values, before RoPE."""
        config = self.config
        query, key = matmul.linear(x, self.query, self.query_bias), matmul.linear(x, self.key, self.key_bias)
        value = matmul.linear(x, self.value, self.value_bias)
        if config.qk_norm:
            query = ops.rms_norm(query, self.query_scale, config.norm_epsilon)
            key = ops.rms_norm(key, self.key_scale, config.norm_epsilon)
        if config.mup_base_width:  # muP divides scores by head_dim, not by its root; 8: equal for heads of width 64
            query = query * (8 / query.shape[-1] ** 0.5)
        return query, key, value

    def attend(
        self,
        query: Float[Array, "batch query heads head_dim"],
        key: Float[Array, "batch key kv_heads head_dim"],
        value: Float[Array, "batch key kv_heads head_dim"],
        mask: AttentionMask,
        cache: CacheView | None,
    ) -> Float[Array, "batch query heads head_dim"]:
        """Attention with the kernel that `choose_kernel` names."""
        config = self.config
        masked = mask.query_segments is not None or mask.key_prefix is not None
        train_length = query.shape[1] if cache is None else 0
        decoding = cache is not None and not cache.prefill
        if choose_kernel(config, train_length, masked, decoding)[0] == "cudnn":
            simple = config.sliding_window is None and not masked
            bias = self.alibi_bias(mask)
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                bias=None if bias is None else bias.astype(query.dtype),
                mask=None if simple else mask.materialize(config.causal, config.sliding_window),
                is_causal=simple and config.causal,
                implementation="cudnn",
            )
        dropout_key = self.make_rng("dropout") if config.dropout and self.has_rng("dropout") else None
        if cache is not None or not config.causal or mask.key_prefix is not None:
            return self.attend_in_chunks(query, key, value, mask, 0, dropout_key)
        return self.attend_in_blocks(query, key, value, mask, dropout_key)

    def attend_in_blocks(
        self, query: Array, key: Array, value: Array, mask: AttentionMask, dropout_key: Array | None
    ) -> Array:
        """Causal attention of a full sequence, in blocks of queries that skip keys outside of the mask."""
        length, window = query.shape[1], self.config.sliding_window
        num_blocks = largest_divisor(length, max(1, min(MAX_BLOCKS, length // MIN_BLOCK)))
        size = length // num_blocks
        # split with heads before tokens, as the matmuls need them; otherwise every block would be transposed by itself
        queries, keys, values = (jnp.split(x.swapaxes(1, 2), num_blocks, axis=2) for x in (query, key, value))
        outputs = []
        for i in range(num_blocks):
            first = 0 if window is None else max(0, i * size - window + 1) // size
            block_mask = mask.slice(i * size, (i + 1) * size, first * size, (i + 1) * size)
            block_key, block_value = (jnp.concatenate(x[first : i + 1], axis=2).swapaxes(1, 2) for x in (keys, values))
            y = self.attend_in_chunks(
                queries[i].swapaxes(1, 2), block_key, block_value, block_mask, i * size, dropout_key
            )
            outputs.append(y.swapaxes(1, 2))
        return jnp.concatenate(outputs, axis=2).swapaxes(1, 2)

    def attend_in_chunks(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: AttentionMask,
        offset: int,
        dropout_key: Array | None,
    ) -> Array:
        """Attention of queries of which the first has the index `offset` in its sequence.

        The backward pass recomputes the scores if they take more memory than the rest of a layer. A device computes at
        most `MAX_SCORES` of them at once and processes queries in sequential chunks if there are more (Rabe & Staats
        2021), so that memory grows linearly with the sequence.
        """
        config = self.config

        def attend_chunk(chunk: tuple[Any, ...]) -> Array:
            query, index, positions, segments = chunk
            chunk_mask = mask._replace(query_positions=positions, query_segments=segments)
            factors = None
            if dropout_key is not None:
                chunk_key = jax.random.fold_in(dropout_key, index[0, 0])
                shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
                factors = ops.dropout(jnp.ones(shape), chunk_key, config.dropout)
            return ops.attention(
                query,
                key,
                value,
                mask=chunk_mask.materialize(config.causal, config.sliding_window),
                bias=self.alibi_bias(chunk_mask),
                cap=config.attention_softcap,
                dropout_factors=factors,
            )

        batch_size, length, num_heads, _ = query.shape
        rows = batch_size / num_batch_devices() if dropout_key is None else DROPOUT_ROWS
        limit = limit_for_backend(MAX_SCORES, MAX_SCORES_ON_GPU)
        chunks = num_chunks(length, round(rows * num_heads * key.shape[1]), limit)
        index = offset + jnp.arange(length)[None]
        arrays = (query, index, jnp.atleast_2d(mask.query_positions), mask.query_segments)
        if chunks > 1:  # tie positions to queries; otherwise a scan over layers saves the masks of all chunks
            arrays = jax.lax.optimization_barrier(arrays)
        scores_per_device = batch_size / num_batch_devices() * num_heads * length * key.shape[1]
        return map_in_chunks(remat_if_large(attend_chunk, scores_per_device), arrays, chunks, axis=1)

    def alibi_bias(self, mask: AttentionMask) -> Float[Array, "batch heads query key"] | None:
        """What ALiBi adds to the scores; None without ALiBi. The batch size may be 1."""
        config = self.config
        if config.positions != "alibi":
            return None
        distances = abs(mask.relative_positions())[:, None].astype(jnp.float32)
        return -alibi_slopes(config.num_heads)[:, None, None] * distances
