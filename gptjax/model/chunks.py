"""Work in parts, one after the other, where all of it at once would not fit in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

REMAT_THRESHOLD = 1 << 18  # float32: 1 MB, which is quicker kept than made again


def remat_if_large(function: Callable[..., Any], numbers: float) -> Callable[..., Any]:
    """The function; where it makes so many numbers on a device that are not its result, again for the gradient."""
    return jax.checkpoint(function) if numbers > REMAT_THRESHOLD else function


def num_chunks(size: int, each: int, most: int) -> int:
    """The fewest parts of `size` things with `each` numbers such that a part has at most `most` numbers."""
    return -(-size // max(1, min(size, most // max(1, each))))


def map_in_chunks(function: Callable[[Any], Any], arrays: Any, chunks: int, axis: int) -> Any:
    """`function(arrays)`, made in equal parts along an axis of all of them, and joined along the same axis.

    What is missing for equal parts is filled up, and left out of the result.
    """
    if chunks == 1:
        return function(arrays)
    size = jax.tree.leaves(arrays)[0].shape[axis]
    each = -(-size // chunks)

    def cut(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, [(0, each * chunks - size if i == axis else 0) for i in range(x.ndim)], mode="edge")
        return filled.reshape(*x.shape[:axis], chunks, each, *x.shape[axis + 1 :]).swapaxes(0, axis)

    def join(x: jax.Array) -> jax.Array:
        x = x.swapaxes(0, axis)
        return jax.lax.slice_in_dim(x.reshape(*x.shape[:axis], chunks * each, *x.shape[axis + 2 :]), 0, size, axis=axis)

    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(cut, arrays)))


def limit_for_backend(on_cpu: int, on_gpu: int) -> int:
    """The limit for where this runs."""
    return on_gpu if jax.default_backend() == "gpu" else on_cpu
