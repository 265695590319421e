"""Computation in sequential chunks, for results whose intermediate values do not all fit in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

REMAT_THRESHOLD = 1 << 18  # float32: 1 MB; saving less is faster than recomputing it


def remat_if_large(function: Callable[..., Any], num_elements: float) -> Callable[..., Any]:
    """The function, recomputed in the backward pass if it has more than `REMAT_THRESHOLD` intermediate elements.

    `num_elements`: of the intermediate values on one device.
    """
    return jax.checkpoint(function) if num_elements > REMAT_THRESHOLD else function


def num_chunks(size: int, elements_per_item: int, limit: int) -> int:
    """The smallest number of chunks of `size` items such that no chunk has more than `limit` elements."""
    return -(-size // max(1, min(size, limit // max(1, elements_per_item))))


def map_in_chunks(function: Callable[[Any], Any], arrays: Any, chunks: int, axis: int) -> Any:
    """`function(arrays)`, computed in chunks of equal size along one axis of all arrays, and concatenated along it.

    The last chunk is padded, and the padding is removed from the result.
    """
    if chunks == 1:
        return function(arrays)
    size = jax.tree.leaves(arrays)[0].shape[axis]
    chunk_size = -(-size // chunks)
    padding = chunk_size * chunks - size

    def split(x: Any) -> jax.Array:
        padded = jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)], mode="edge")
        return padded.reshape(*x.shape[:axis], chunks, chunk_size, *x.shape[axis + 1 :]).swapaxes(0, axis)

    def join(x: jax.Array) -> jax.Array:
        x = x.swapaxes(0, axis)
        joined = x.reshape(*x.shape[:axis], chunks * chunk_size, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(joined, 0, size, axis=axis)

    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(split, arrays)))
