"""The key/value cache: the keys and values of the tokens that a model has read, so that a new token costs one step.

The cache is a ring buffer: the token at position p is stored in slot p mod slots. An overwritten token is no longer
attended to, as with a sliding window.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.model.attention import KVCache
from gptjax.model.gpt import Cache


def bucket(length: int) -> int:
    """Rounds a length up to 16, 24, 32, 48, 64, 96, 128, ..., so that few programs are compiled."""
    size = 16
    while size < length:
        size *= 2
    if size > 16 and length <= size * 3 // 4:
        return size * 3 // 4
    return size


def is_unbounded(config: ModelConfig) -> bool:
    """Whether sequences may be longer than the context: not with learned positions, whose table ends there."""
    return config.positions != "learned"


def padded_length(config: ModelConfig, length: int) -> int:
    """The `bucket` of a length; at most the context where the positions end there."""
    if is_unbounded(config):
        return bucket(length)
    return min(bucket(length), config.context_length)


def limit_window(config: ModelConfig, total: int) -> ModelConfig:
    """The model for sequences of `total` tokens: beyond the context each token attends to the last `context_length`."""
    if total <= config.context_length:
        return config
    return dataclasses.replace(config, sliding_window=min(config.sliding_window or total, config.context_length))


def cache_length_for(config: ModelConfig, total: int, per_step: int = 1) -> int:
    """Slots for sequences of `total` tokens, of which `per_step` are decoded at once after the prefill."""
    window = min(total, limit_window(config, total).sliding_window or total)
    if window == total:
        return bucket(total)
    return bucket(min(window + per_step - 1, total))


def cache_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of the model; float32 on a CPU, which would convert bfloat16 again in every step."""
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else config.dtype)


def empty_cache(config: ModelConfig, rows: int, slots: int) -> Cache:
    """A cache for the last `slots` tokens of each row: per layer keys and values [rows, kv_heads, slots, head_dim]."""
    config = config.resolved()
    assert config.num_kv_heads and config.head_dim
    shape, dtype = (rows, config.num_kv_heads, slots, config.head_dim), cache_dtype(config)
    return tuple(KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))


def cache_bytes(config: ModelConfig, rows: int, slots: int) -> int:
    """The size of `empty_cache`: 2 x layers x rows x slots x kv_heads x head_dim elements."""
    config = config.resolved()
    assert config.num_kv_heads and config.head_dim
    elements = 2 * config.num_layers * rows * slots * config.num_kv_heads * config.head_dim
    return elements * cache_dtype(config).itemsize
