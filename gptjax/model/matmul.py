"""Products with matrices, in the forms that weights take, and as they are quick on each backend.

Sums are taken in float32 whatever the factors are.
"""

import math
import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from gptjax import cpu

MIN_PRODUCTS_PER_ELEMENT = 32  # multiplications for each number of the factors: with fewer, widening them costs more than it saves


class Int8(NamedTuple):
    """A matrix [*in, *out] in one byte a weight: `values * scale`, each output with a scale of its own."""

    values: Array  # int8 [out, in], the axes of either side flattened
    scale: Array  # float32 [*out]


class Transposed(NamedTuple):
    """A matrix [*in, *out] laid as [*out, *in]: bfloat16 products of few rows are a fifth faster for it on a CPU."""

    values: Array


class LowRank(NamedTuple):
    """A matrix [*in, *out] with what was learnt beside it: `weight + scale * down up` (LoRA, Hu et al. 2021)."""

    weight: Array
    down: Array  # [*in, rank]
    up: Array  # [rank, *out]
    scale: float


Matrix = Array | Int8 | Transposed | LowRank


def transpose_matrix(weight: Array, num_inputs: int) -> Transposed:
    """A matrix whose first `num_inputs` axes are summed over, laid the other way round."""
    axes = tuple(range(weight.ndim))
    return Transposed(weight.transpose(axes[num_inputs:] + axes[:num_inputs]))


def quantize_int8(weight: Array, num_inputs: int) -> Int8:
    """Rounds a matrix whose first `num_inputs` axes are summed over to 8 bits, symmetric around 0."""
    inputs = math.prod(weight.shape[:num_inputs])
    rows = weight.astype(jnp.float32).reshape(inputs, -1).T
    values, scale = _to_int8(rows)
    return Int8(values, scale.reshape(weight.shape[num_inputs:]))


def _to_int8(rows: Array) -> tuple[Array, Array]:
    """float32 [R, D] -> int8 [R, D] and float32 [R]: the largest number of a row becomes 127."""
    scale = jnp.maximum(abs(rows).max(-1), 1e-30) / 127
    return jnp.round(rows / scale[:, None]).astype(jnp.int8), scale


def linear(x: Array, weight: Matrix, bias: Array | None = None, num_inputs: int = 1) -> Array:
    """[..., *in] times a weight [*in, *out], plus a bias [*out] -> [..., *out] in x's dtype.

    `num_inputs` is the number of axes in `in`. Sums are taken in float32, those of the bias and its gradient as well.
    With 8-bit weights the activations of each row are rounded to 8 bits (LLM.int8 without outliers, Dettmers et al.
    2022).
    """
    if bias is not None:
        return (linear(x, weight, None, num_inputs).astype(jnp.float32) + bias).astype(x.dtype)
    if isinstance(weight, LowRank):
        learnt = linear(linear(x, weight.down, None, num_inputs), weight.up)
        return linear(x, weight.weight, None, num_inputs) + weight.scale * learnt
    rows = x.reshape(-1, math.prod(x.shape[x.ndim - num_inputs :]))  # plain products of plain matrices, without copies
    if isinstance(weight, Int8):
        out = weight.scale.shape
        values, scale = _to_int8(rows.astype(jnp.float32))
        sums = jnp.einsum("rd,ed->re", values, weight.values, preferred_element_type=jnp.int32)
        y = (sums * scale[:, None] * weight.scale.reshape(-1)).astype(x.dtype)
    elif isinstance(weight, Transposed):
        out = weight.values.shape[: weight.values.ndim - num_inputs]
        y = einsum_f32("rd,ed->re", rows, weight.values.reshape(-1, rows.shape[1]))
    else:
        out = weight.shape[num_inputs:]
        y = einsum_f32("rd,de->re", rows, weight.reshape(rows.shape[1], -1))
    return y.reshape(*x.shape[: x.ndim - num_inputs], *out)


def lookup(table: Array | Int8 | LowRank, ids: Array) -> Array:
    """Rows of a table [V, D]: ids [...] -> [..., D]."""
    if isinstance(table, LowRank):
        return table.weight[ids] + table.scale * linear(table.down[ids], table.up)
    if isinstance(table, Int8):
        return table.values[ids] * table.scale[ids][..., None]
    return table[ids]


def logits(x: Array, table: Array | Int8 | LowRank, head: Array | Int8 | Transposed | None) -> Array:
    """[B, Q, D] against the rows of a table [V, D], or through a head [D, V] where there is one: float32 [B, Q, V]."""
    weight = table if head is None else head
    if isinstance(weight, LowRank):
        return logits(x, weight.weight, None) + weight.scale * logits(linear(x, weight.up.T), weight.down, None)
    if isinstance(weight, Int8):  # [V, D] in both cases
        return linear(x.astype(jnp.float32), weight)
    if isinstance(weight, Transposed):
        weight, head = weight.values, None
    spec = "bqe,ve->bqv" if head is None else "bqe,ev->bqv"
    return einsum_f32(spec, x, weight, jnp.float32)


def einsum_f32(spec: str, a: Array, b: Array, dtype: DTypeLike | None = None) -> Array:
    """`einsum` of two arrays of one dtype, with sums in float32 and the result in that dtype, or in the one given."""
    if a.dtype == jnp.float32:
        return jnp.einsum(spec, a, b)
    return _low_precision_einsum(spec, jnp.dtype(dtype or a.dtype), a, b)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _low_precision_einsum(spec: str, dtype: jnp.dtype, a: Array, b: Array) -> Array:
    """XLA's CPU products are 3 to 10 times faster where the result is float32, and then rounded by itself.

    The derivative is written out, so that its two products have narrow factors as well, and lie as they are quickest.
    """
    if _upcast_is_faster(spec, a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(dtype)


def _upcast_is_faster(spec: str, a: Array, b: Array) -> bool:
    """Whether the same product, each number of the factors written as float32, which is exact, takes less time."""
    if jax.default_backend() != "cpu" or cpu.bfloat16_matmul_is_fast():
        return False
    left, right, _ = re.split(",|->", spec)
    sizes = dict(zip(left + right, a.shape + b.shape, strict=True))
    return math.prod(sizes.values()) > MIN_PRODUCTS_PER_ELEMENT * (a.size + b.size)


def _low_precision_forward(spec: str, dtype: jnp.dtype, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _low_precision_einsum(spec, dtype, a, b), (a, b)


def _low_precision_backward(spec: str, dtype: jnp.dtype, factors: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    a, b = factors
    dy = dy.astype(a.dtype)
    left, right, out = re.split(",|->", spec)
    return _einsum_in_cpu_layout(f"{out},{right}->{left}", dy, b), _einsum_in_cpu_layout(f"{left},{out}->{right}", a, dy)


_low_precision_einsum.defvjp(_low_precision_forward, _low_precision_backward)


def _einsum_in_cpu_layout(spec: str, a: Array, b: Array) -> Array:
    """A narrow product, of which XLA's kernels for CPUs are quick only where the axes to sum over are a factor's last.

    Where they are not, the smaller factor is turned first, and the turned copy is held by a barrier, as else XLA would
    work it into the product again.
    """
    left, right, out = re.split(",|->", spec)
    summed = "".join(axis for axis in left if axis not in out)
    at_its_best = left.endswith(summed) or right.endswith(summed) or _upcast_is_faster(spec, a, b)
    if jax.default_backend() != "cpu" or at_its_best:
        return _low_precision_einsum(spec, a.dtype, a, b)
    if a.size > b.size:
        (left, a), (right, b) = (right, b), (left, a)
    batch = "".join(axis for axis in left if axis in right and axis in out)
    first, second = ("".join(axis for axis in side if axis not in batch + summed) for side in (left, right))
    turned = jnp.einsum(f"{left}->{batch}{first}{summed}", a)
    turned = jax.lax.optimization_barrier(with_layout_constraint(turned, Layout(tuple(range(turned.ndim)))))
    y = _low_precision_einsum(f"{batch}{first}{summed},{right}->{batch}{first}{second}", a.dtype, turned, b)
    return jnp.einsum(f"{batch}{first}{second}->{out}", y)


@jax.custom_vjp
def gradient_barrier(x: Array) -> Array:
    """x itself, of which the gradient is made once: XLA would add it up again for everything that it is needed for.

    On a CPU, where the residual stream's gradient, with what all later layers add to it, was worked into every copy.
    """
    return x


gradient_barrier.defvjp(lambda x: (x, None), lambda _, gradient: (barrier(gradient),))


def barrier(x: Array) -> Array:
    """x itself, which on a CPU is made once, and not worked into all that it is needed for."""
    return jax.lax.optimization_barrier(x) if jax.default_backend() == "cpu" else x
