"""The key/value cache: what a model keeps of the tokens it has read, so that the next one costs one step.

A cache never overflows: it rolls. The token at place p lies in slot p mod slots, and a token that has been overwritten
is out of sight, as a sliding window would have it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gptjax import config
from gptjax.model.attention import KVCache
from gptjax.model.gpt import Cache


def bucket(length: int) -> int:
    """The length that is compiled for, so that few ever are: the next of 16, 24, 32, 48, 64, 96, 128, ..."""
    size = 16
    while size < length:
        size *= 2
    return size * 3 // 4 if size > 16 and length <= size * 3 // 4 else size


def rolls(model: config.ModelConfig) -> bool:
    """Whether texts may be longer than the context: where no position is looked up in a table of that length."""
    return model.positions != "learned"


def limit_window(model: config.ModelConfig, total: int) -> config.ModelConfig:
    """The model for texts of `total` tokens: beyond the context every token sees the last `context_length` tokens."""
    if total <= model.context_length:
        return model
    return dataclasses.replace(model, sliding_window=min(model.sliding_window or total, model.context_length))


def slots_for(model: config.ModelConfig, total: int, at_once: int = 1) -> int:
    """Slots for texts of `total` tokens, of which `at_once` are read in one call once the cache is not empty."""
    seen = min(total, limit_window(model, total).sliding_window or total)
    return bucket(min(seen + at_once - 1, total) if seen < total else total)


def cache_dtype(model: config.ModelConfig) -> jnp.dtype:
    """That of the computation; float32 on a CPU, where bfloat16 is unpacked again for every token that is read."""
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else model.dtype)


def empty_cache(model: config.ModelConfig, rows: int, slots: int) -> Cache:
    """Room for the last `slots` tokens of each text: per layer keys and values [rows, kv_heads, slots, head_dim]."""
    m = model.resolved()
    assert m.num_kv_heads and m.head_dim
    shape, dtype = (rows, m.num_kv_heads, slots, m.head_dim), cache_dtype(m)
    return tuple(KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(m.num_layers))


def cache_bytes(model: config.ModelConfig, rows: int, slots: int) -> int:
    """What `empty_cache` takes: 2 x layers x rows x slots x kv_heads x head_dim numbers."""
    m = model.resolved()
    assert m.num_kv_heads and m.head_dim
    return 2 * m.num_layers * rows * slots * m.num_kv_heads * m.head_dim * cache_dtype(m).itemsize
