"""The key/value cache: what a model keeps of the tokens it has read, so that the next one costs one step."""

import jax.numpy as jnp

from gptjax import config
from gptjax.model.attention import KVCache


def empty_cache(model: config.Model, batch: int, length: int) -> KVCache:
    """Room for `length` tokens of `batch` texts: keys and values [layers, batch, length, kv_heads, head_dim]."""
    m = model.resolved()
    shape = (m.num_layers, batch, length, m.num_kv_heads, m.head_dim)
    return KVCache(jnp.zeros(shape, m.dtype), jnp.zeros(shape, m.dtype))


def cache_bytes(model: config.Model, batch: int, length: int) -> int:
    """What `empty_cache` takes."""
    m = model.resolved()
    assert m.num_kv_heads and m.head_dim
    return 2 * m.num_layers * batch * length * m.num_kv_heads * m.head_dim * jnp.dtype(m.dtype).itemsize
