"""Work in parts, one after the other, where all of it at once would not fit in memory."""

from collections.abc import Callable
from typing import Any

import jax


def count(size: int, each: int, most: int) -> int:
    """The fewest equal parts of `size` things with `each` numbers such that a part has at most `most` numbers."""
    return next(n for n in range(1, size + 1) if size % n == 0 and (size // n * each <= most or n == size))


def by_chunks(function: Callable[[Any], Any], arrays: Any, chunks: int, axis: int) -> Any:
    """`function(arrays)`, made in equal parts along an axis of all of them, and joined along the same axis."""
    if chunks == 1:
        return function(arrays)

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:axis], chunks, -1, *x.shape[axis + 1 :]).swapaxes(0, axis)

    def join(x: jax.Array) -> jax.Array:
        x = x.swapaxes(0, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(cut, arrays)))
