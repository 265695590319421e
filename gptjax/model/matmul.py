"""Matrix products for every form of a weight, each computed in the way that is fast on the backend.

Products accumulate in float32 whatever the dtype of their operands is.
"""

import math
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Int8

from gptjax.model import kernels

MIN_PRODUCTS_PER_ELEMENT = 32  # multiplications per element of the operands; with fewer, upcasting costs more time


class QuantizedMatrix(NamedTuple):
    """A matrix [*in, *out] with one byte per weight: `values * scale`, with one scale per output."""

    values: Int8[Array, "out in"]  # the axes of each side flattened
    scale: Float[Array, "*out"]


class Transposed(NamedTuple):
    """A matrix [*in, *out] stored as [*out, *in]: on a CPU bfloat16 products of few rows are a fifth faster."""

    values: Float[Array, "..."]


class LowRank(NamedTuple):
    """A matrix [*in, *out] with a trainable low-rank update: `weight + scale * lora_a lora_b` (Hu et al. 2021)."""

    weight: Float[Array, "..."]
    lora_a: Float[Array, "*in rank"]
    lora_b: Float[Array, " rank *out"]
    scale: float


AnyArray = Any  # of JAX or NumPy
Matrix = Array | QuantizedMatrix | Transposed | LowRank


def transpose_matrix(weight: Float[Array, "..."], num_inputs: int) -> Transposed:
    """The transpose of a matrix whose first `num_inputs` axes are summed over."""
    axes = tuple(range(weight.ndim))
    return Transposed(weight.transpose(axes[num_inputs:] + axes[:num_inputs]))


def quantize_int8(weight: Float[Array, "..."], num_inputs: int) -> QuantizedMatrix:
    """Rounds a matrix whose first `num_inputs` axes are summed over to 8 bits, symmetric around 0."""
    inputs = math.prod(weight.shape[:num_inputs])
    rows = weight.astype(jnp.float32).reshape(inputs, -1).T
    values, scale = _quantize_rows(rows)
    return QuantizedMatrix(values, scale.reshape(weight.shape[num_inputs:]))


def _quantize_rows(
    rows: Float[Array, "rows features"],
) -> tuple[Int8[Array, "rows features"], Float[Array, " rows"]]:
    """The largest absolute value of each row becomes 127."""
    scale = jnp.maximum(abs(rows).max(-1), 1e-30) / 127
    return jnp.round(rows / scale[:, None]).astype(jnp.int8), scale


def linear(x: Float[Array, "..."], weight: Matrix, bias: Array | None = None, num_inputs: int = 1) -> Array:
    """x [..., *in] times a weight [*in, *out], plus a bias [*out] -> [..., *out] in x's dtype.

    `num_inputs` is the number of axes in `in`. Accumulates in float32, the bias and its gradient as well. For 8-bit
    weights the activations of each row are rounded to 8 bits (LLM.int8 without outliers, Dettmers et al. 2022).
    """
    if bias is not None:
        return (linear(x, weight, None, num_inputs).astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
    if isinstance(weight, LowRank):
        update = linear(linear(x, weight.lora_a, None, num_inputs), weight.lora_b)
        return linear(x, weight.weight, None, num_inputs) + weight.scale * update
    rows = x.reshape(-1, math.prod(x.shape[x.ndim - num_inputs :]))  # plain products of plain matrices, without copies
    if isinstance(weight, QuantizedMatrix):
        out = weight.scale.shape
        values, scale = _quantize_rows(rows.astype(jnp.float32))
        sums = jnp.einsum("rd,ed->re", values, weight.values, preferred_element_type=jnp.int32)
        y = (sums * scale[:, None] * weight.scale.reshape(-1)).astype(x.dtype)
    elif isinstance(weight, Transposed):
        out = weight.values.shape[: weight.values.ndim - num_inputs]
        y = einsum_f32("rd,ed->re", rows, weight.values.reshape(-1, rows.shape[1]))
    else:
        out = weight.shape[num_inputs:]
        y = einsum_f32("rd,de->re", rows, weight.reshape(rows.shape[1], -1))
    return y.reshape(*x.shape[: x.ndim - num_inputs], *out)


def lookup(table: Array | QuantizedMatrix | LowRank, ids: Int[AnyArray, "*batch"]) -> Float[Array, "*batch embed"]:
    """Rows of a table [vocab, embed]."""
    if isinstance(table, LowRank):
        return table.weight[ids] + table.scale * linear(table.lora_a[ids], table.lora_b)
    if isinstance(table, QuantizedMatrix):
        return table.values[ids] * table.scale[ids][..., None]
    return table[ids]


def logits(
    x: Float[Array, "batch length embed"],
    table: Array | QuantizedMatrix | LowRank,
    head: Array | QuantizedMatrix | Transposed | None,
) -> Float[Array, "batch length vocab"]:
    """x times the rows of a table [vocab, embed], or times a head [embed, vocab] if there is one: float32."""
    weight = table if head is None else head
    if isinstance(weight, LowRank):
        y = logits(x, weight.weight, None)
        return y + weight.scale * logits(linear(x, weight.lora_b.T), weight.lora_a, None)
    if isinstance(weight, QuantizedMatrix):  # [vocab, embed] in both cases
        return linear(x.astype(jnp.float32), weight)
    if isinstance(weight, Transposed):
        weight, head = weight.values, None
    spec = "bqe,ve->bqv" if head is None else "bqe,ev->bqv"
    return einsum_f32(spec, x, weight, jnp.float32)


def einsum_f32(spec: str, a: Array, b: Array, dtype: DTypeLike | None = None) -> Array:
    """`einsum` of two arrays of one dtype that accumulates in float32. Default: the result has the same dtype."""
    if a.dtype == jnp.float32:
        return jnp.einsum(spec, a, b)
    return _low_precision_einsum(spec, jnp.dtype(dtype or a.dtype), a, b)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _low_precision_einsum(spec: str, dtype: jnp.dtype, a: Array, b: Array) -> Array:
    """On a CPU XLA's products are 3 to 10 times faster if the result is float32 and is rounded afterwards.

    The derivative is written out, so that its two products have low-precision operands and a fast layout as well.
    """
    if _upcast_is_faster(spec, a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(dtype)


def _upcast_is_faster(spec: str, a: Array, b: Array) -> bool:
    """Whether the same product takes less time after the operands were converted to float32, which is exact."""
    if kernels.low_precision_matmul_is_fast():
        return False
    left, right, _ = re.split(",|->", spec)
    sizes = dict(zip(left + right, a.shape + b.shape, strict=True))
    return math.prod(sizes.values()) > MIN_PRODUCTS_PER_ELEMENT * (a.size + b.size)


def _low_precision_forward(spec: str, dtype: jnp.dtype, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _low_precision_einsum(spec, dtype, a, b), (a, b)


def _low_precision_backward(
    spec: str, dtype: jnp.dtype, operands: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    a, b = operands
    dy = dy.astype(a.dtype)
    left, right, out = re.split(",|->", spec)
    da = _einsum_in_fast_layout(f"{out},{right}->{left}", dy, b)
    db = _einsum_in_fast_layout(f"{left},{out}->{right}", a, dy)
    return da, db


_low_precision_einsum.defvjp(_low_precision_forward, _low_precision_backward)


def _einsum_in_fast_layout(spec: str, a: Array, b: Array) -> Array:
    """A low-precision product. XLA's CPU kernels are fast only if the summed axes are the last ones of an operand.

    If they are not, the smaller operand is transposed first. A barrier keeps the transposed copy, as XLA would fuse
    the transpose into the product otherwise.
    """
    left, right, out = re.split(",|->", spec)
    summed = "".join(axis for axis in left if axis not in out)
    is_fast = left.endswith(summed) or right.endswith(summed) or _upcast_is_faster(spec, a, b)
    if not kernels.on_cpu() or is_fast:
        return _low_precision_einsum(spec, a.dtype, a, b)
    if a.size > b.size:
        (left, a), (right, b) = (right, b), (left, a)
    batch = "".join(axis for axis in left if axis in right and axis in out)
    first, second = ("".join(axis for axis in side if axis not in batch + summed) for side in (left, right))
    transposed = jnp.einsum(f"{left}->{batch}{first}{summed}", a)
    row_major = Layout(tuple(range(transposed.ndim)))
    transposed = jax.lax.optimization_barrier(with_layout_constraint(transposed, row_major))
    y = _low_precision_einsum(f"{batch}{first}{summed},{right}->{batch}{first}{second}", a.dtype, transposed, b)
    return jnp.einsum(f"{batch}{first}{second}->{out}", y)


@jax.custom_vjp
def gradient_barrier(x: Array) -> Array:
    """x, whose gradient is computed once. Without it XLA on a CPU recomputes the gradient for each of its uses.

    The gradient of the residual stream, a sum over all later layers, was recomputed in this way.
    """
    return x


gradient_barrier.defvjp(lambda x: (x, None), lambda _, gradient: (barrier(gradient),))


def barrier(x: Array) -> Array:
    """x, which XLA on a CPU computes once and does not fuse into each of its uses."""
    return jax.lax.optimization_barrier(x) if kernels.on_cpu() else x
