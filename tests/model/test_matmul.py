"""Products with every form of a matrix and every dtype against float64, with their gradients."""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import cpu
from gptjax.model import matmul


@settings(max_examples=12, deadline=None)
@given(
    spec=st.sampled_from(
        ["ax,xp->ap", "abx,xpq->abpq", "abxy,xyp->abp", "bmrk,bmkh->bmrh", "bmrh,bmkh->bmrk", "ab,b->a"]
    ),
    sizes=st.dictionaries(st.sampled_from("abxypqmrkh"), st.integers(1, 7), min_size=10),
    float32_result=st.booleans(),
    fast=st.booleans(),
    seed=st.integers(0, 1000),
)
@mock.patch.object(matmul, "MIN_PRODUCTS_PER_ELEMENT", 0)
def test_a_low_precision_product_and_its_gradients_match_float64(spec, sizes, float32_result, fast, seed):
    rng, (left, right, out) = np.random.default_rng(seed), re.split(",|->", spec)
    draw = lambda axes: jnp.asarray(rng.normal(size=[sizes[axis] for axis in axes]), jnp.bfloat16)  # noqa: E731
    a, b, dy = draw(left), draw(right), draw(out)
    with mock.patch.object(cpu, "bfloat16_matmul_is_fast", lambda: fast):  # if not, operands become float32
        y, backward = jax.vjp(lambda a, b: matmul.einsum_f32(spec, a, b, jnp.float32 if float32_result else None), a, b)
        da, db = backward(dy.astype(y.dtype))
    assert y.dtype == (jnp.float32 if float32_result else jnp.bfloat16) and da.dtype == db.dtype == jnp.bfloat16
    a, b, dy = (np.asarray(x, np.float64) for x in (a, b, dy))
    for result, rule, left_operand, right_operand in [
        (y, spec, a, b),
        (da, f"{out},{right}->{left}", dy, b),
        (db, f"{left},{out}->{right}", a, dy),
    ]:
        expected = np.einsum(rule, left_operand, right_operand)
        size = np.einsum(rule, abs(left_operand), abs(right_operand))  # rounding errors are relative to it
        tolerance = 1e-5 if result.dtype == jnp.float32 else 2**-8
        assert (abs(np.asarray(result, np.float64) - expected) <= tolerance * size + 1e-30).all()


def test_a_bias_and_its_gradient_are_summed_in_float32():
    x, weight = jnp.ones((4096, 2), jnp.bfloat16), jnp.full((2, 3), 64.0, jnp.bfloat16)
    bias = jnp.full(3, 0.5, jnp.bfloat16)
    y, backward = jax.vjp(lambda bias: matmul.linear(x, weight, bias), bias)
    assert y.dtype == jnp.bfloat16 and (y == 128.5).all()  # 128 + 0.5 is rounded once
    assert (backward(jnp.ones_like(y))[0] == 4096).all()  # in bfloat16 256 + 1 would be 256


def test_a_gradient_barrier_does_not_change_the_gradient():
    f = lambda x, barrier: (barrier(jnp.sin(x) * 2) ** 2).sum()  # noqa: E731
    x = jnp.linspace(-1, 1, 11)
    np.testing.assert_array_equal(jax.grad(f)(x, matmul.gradient_barrier), jax.grad(f)(x, lambda x: x))


@pytest.mark.parametrize(("shape", "num_inputs"), [((6, 10), 1), ((6, 2, 5), 1), ((2, 3, 10), 2)])
def test_transposed_and_quantized_matrices_have_the_same_product(shape, num_inputs):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, *shape[:num_inputs])).astype(np.float32)
    weight = rng.normal(size=shape).astype(np.float32)
    expected = np.tensordot(x.astype(np.float64), weight, num_inputs)
    for form in (jnp.asarray(weight), matmul.transpose_matrix(jnp.asarray(weight), num_inputs)):
        np.testing.assert_allclose(
            matmul.linear(jnp.asarray(x), form, None, num_inputs), expected, rtol=1e-5, atol=1e-5
        )
    quantized = matmul.quantize_int8(jnp.asarray(weight), num_inputs)
    y = matmul.linear(jnp.asarray(x), quantized, None, num_inputs)
    np.testing.assert_allclose(y, expected, atol=0.03 * abs(expected).max())
