"""The operations against independent references: float64 NumPy loops, and formulas as the papers write them."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.model import ops, positions


def numpy_attention(query, key, value, bias, causal, window, segments, cap, factors):
    """Attention one query and one key at a time, in float64."""
    batch, length, heads, width = query.shape
    group = heads // key.shape[2]
    out = np.zeros(query.shape)
    for b in range(batch):
        for n in range(heads):
            for i in range(length):
                scores = []
                for j in range(length):
                    score = query[b, i, n] @ key[b, j, n // group] / math.sqrt(width)
                    if cap is not None:
                        score = cap * math.tanh(score / cap)
                    score += bias[b % len(bias), n, i, j]
                    hidden = (causal and j > i) or (window is not None and abs(i - j) >= window)
                    hidden = hidden or (segments is not None and segments[b, i] != segments[b, j])
                    scores.append(-math.inf if hidden else score)
                weights = np.exp(np.array(scores) - max(scores))
                out[b, i, n] = (weights / weights.sum() * factors[b, n, i]) @ value[b, :, n // group]
    return out


def slope(function, inputs, directions, cotangent):
    """The directional derivative of `(function(inputs) * cotangent).sum()`, by finite differences in float64."""
    step = 1e-6
    ends = [function(*(x + s * d for x, d in zip(inputs, directions, strict=True))) for s in (step, -step)]
    return ((ends[0] - ends[1]) * cotangent).sum() / (2 * step)


def slope_by_gradient(function, inputs, directions, cotangent):
    """The directional derivative from the gradients of `function` in float32."""
    _, backward = jax.vjp(function, *(jnp.asarray(x, jnp.float32) for x in inputs))
    gradients = backward(jnp.asarray(cotangent, jnp.float32))
    return sum((np.asarray(g, np.float64) * d).sum() for g, d in zip(gradients, directions, strict=True))


@settings(max_examples=20, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 6),
    documents=st.booleans(),
    biases=st.sampled_from([0, 1, 2]),
    cap=st.none() | st.floats(0.5, 50),
    dropout=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_attention_and_its_gradients_match_the_float64_loop(
    kv_heads, group, causal, window, documents, biases, cap, dropout, seed
):
    rng = np.random.default_rng(seed)
    heads = kv_heads * group
    query = rng.normal(size=(2, 5, heads, 4))
    key, value = rng.normal(size=(2, 2, 5, kv_heads, 4))
    segments = np.sort(rng.integers(0, 3, (2, 5)), 1) if documents else None
    factors = rng.integers(0, 2, (2, heads, 5, 5)) * 2.0 if dropout else np.ones((2, heads, 5, 5))
    rules = dict(causal=causal, window=window, segments=segments, cap=cap, factors=factors)
    reference = partial(numpy_attention, **rules)

    index = jnp.arange(5)
    segments = None if segments is None else jnp.array(segments)
    mask = positions.AttentionMask(index, index, segments, segments).materialize(causal, window)
    dropped = jnp.asarray(factors, jnp.float32) if dropout else None

    def ours(query, key, value, bias):
        """No bias, one for all rows, or one for each."""
        bias = bias if biases else None
        return ops.attention(query, key, value, mask=mask, bias=bias, cap=cap, dropout_factors=dropped)

    bias = rng.normal(size=(biases, heads, 5, 5)) if biases else np.zeros((1, heads, 5, 5))
    inputs = (query, key, value, bias)
    np.testing.assert_allclose(ours(*(jnp.array(x, jnp.float32) for x in inputs)), reference(*inputs), atol=4e-6)
    directions, cotangent = [rng.normal(size=x.shape) for x in inputs], rng.normal(size=query.shape)
    directions[3] *= biases > 0
    expected = slope(reference, inputs, directions, cotangent)
    assert slope_by_gradient(ours, inputs, directions, cotangent) == pytest.approx(expected, abs=1e-4)


def test_a_query_without_keys_gets_the_mean_of_the_values_and_has_no_gradient_to_the_scores():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 4, 2, 8))
    mask = jnp.ones((1, 1, 4, 4), bool).at[0, 0, 2].set(False)
    out, backward = jax.vjp(lambda *x: ops.attention(*x, mask=mask)[:, 2], query, key, value)
    np.testing.assert_allclose(out, value.mean(1), atol=1e-6)
    d_query, d_key, d_value = backward(jnp.ones_like(out))
    assert not d_query.any() and not d_key.any()
    np.testing.assert_allclose(d_value, jnp.full_like(value, 1 / 4), rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    causal=st.booleans(),
    window=st.none() | st.integers(1, 6),
    documents=st.booleans(),
    prefix=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_mask_of_every_pair_follows_the_rules(causal, window, documents, prefix, seed):
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(0, 3, (2, 6)), 1) if documents else None
    prefix_mask = rng.random((2, 6)) < 0.5 if prefix else None

    def attends(row, query, key):
        early = key <= query or (prefix_mask is not None and prefix_mask[row, key])
        near = window is None or abs(query - key) < window
        together = segments is None or segments[row, query] == segments[row, key]
        return (early or not causal) and near and together

    expected = [[[attends(row, q, k) for k in range(6)] for q in range(6)] for row in range(2)]
    inputs = [None if x is None else jnp.array(x) for x in (segments, segments, prefix_mask)]
    mask = positions.AttentionMask(jnp.arange(6), jnp.arange(6), *inputs).materialize(causal, window)
    mask = np.ones((1, 1, 6, 6), bool) if mask is None else mask
    np.testing.assert_array_equal(np.broadcast_to(mask, (2, 1, 6, 6))[:, 0], expected)


@settings(max_examples=20, deadline=None)
@given(
    scaling=st.sampled_from(["none", "linear", "ntk", "yarn"]),
    base=st.sampled_from([100.0, 10_000.0, 500_000.0]),
    shift=st.integers(0, 50),
    seed=st.integers(0, 1000),
)
def test_rope_scores_depend_on_relative_positions_only(scaling, base, shift, seed):
    factor = 1.0 if scaling == "none" else 4.0
    config = tiny_model(positions="rope", rope_theta=base, rope_scaling=scaling, rope_factor=factor, head_dim=8)
    query, key = jax.random.normal(jax.random.key(seed), (2, 1, 6, 1, 8))
    index = jnp.arange(6)
    scores = [
        jnp.einsum("bqnh,bknh->bqk", positions.apply_rope(query, table), positions.apply_rope(key, table))
        for table in (positions.rope_table(config, index), positions.rope_table(config, index + shift))
    ]
    np.testing.assert_allclose(scores[0], scores[1], atol=3e-4)


def test_rope_keeps_norms_and_does_not_change_position_zero():
    config = tiny_model(positions="rope")
    x = jax.random.normal(jax.random.key(0), (1, 9, 2, 8))
    rotated = positions.apply_rope(x, positions.rope_table(config, jnp.arange(9)))
    np.testing.assert_allclose(jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(rotated[:, 0], x[:, 0])


def test_rope_scalings_stretch_the_right_pairs():
    plain, _ = positions.rope_frequencies(tiny_model(positions="rope", head_dim=64, context_length=4096))
    frequencies = lambda kind: positions.rope_frequencies(  # noqa: E731
        tiny_model(positions="rope", head_dim=64, rope_scaling=kind, rope_factor=4.0, rope_original_length=1024)
    )
    linear, _ = frequencies("linear")
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    ntk, _ = frequencies("ntk")
    np.testing.assert_allclose([ntk[0] / plain[0], ntk[-1] / plain[-1]], [1, 1 / 4], rtol=1e-4)
    assert np.all(np.diff(ntk / plain) < 0)
    yarn, factor = frequencies("yarn")
    rotations = 1024 * np.array(plain) / (2 * math.pi)  # within the original context
    np.testing.assert_allclose(yarn[rotations > 34], plain[rotations > 34], rtol=1e-6)  # fast pairs do not change
    np.testing.assert_allclose(
        yarn[rotations < 0.7], plain[rotations < 0.7] / 4, rtol=1e-6
    )  # slow ones are interpolated
    assert factor == pytest.approx(0.1 * math.log(4) + 1)


def test_alibi_slopes_match_the_paper():
    np.testing.assert_allclose(positions.alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    twelve = [2.0**-i for i in range(1, 9)] + [2 ** (-i / 2) for i in (1, 3, 5, 7)]
    np.testing.assert_allclose(positions.alibi_slopes(12), twelve, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_norms_and_their_gradients_match_the_float64_formulas(seed, scale):
    def layer_norm(x, gain, shift):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gain + shift

    def rms_norm(x, gain):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain

    rng = np.random.default_rng(seed)
    inputs = rng.normal(1, scale, (3, 7)), rng.normal(size=7), rng.normal(size=7)
    directions, cotangent = (scale * rng.normal(size=(3, 7)), *rng.normal(size=(2, 7))), rng.normal(size=(3, 7))
    for ours, reference, count, atol in [
        (partial(ops.layer_norm, epsilon=1e-5), layer_norm, 3, 2e-4),
        (partial(ops.rms_norm, epsilon=1e-5), rms_norm, 2, 1e-5),
    ]:
        x, along = inputs[:count], directions[:count]
        y = ours(*(jnp.asarray(v, jnp.float32) for v in x))
        np.testing.assert_allclose(y, reference(*x), rtol=2e-4, atol=atol)
        expected = slope(reference, x, along, cotangent)
        assert slope_by_gradient(ours, x, along, cotangent) == pytest.approx(expected, abs=2e-3)


def test_a_norm_saves_its_input_and_two_numbers_per_row():
    x, scale = jnp.ones((5, 64), jnp.bfloat16), jnp.ones(64)
    _, backward = jax.vjp(lambda x: ops.layer_norm(x, scale, None, 1e-5), x)
    saved = sorted((x.shape, x.dtype.name) for x in jax.tree.leaves(backward) if x.ndim > 1)
    assert saved == [((5, 1), "float32"), ((5, 1), "float32"), ((5, 64), "bfloat16")]


def test_activations_match_their_formulas():
    x = np.linspace(-4, 4, 33)
    erf = np.array([math.erf(v / math.sqrt(2)) for v in x])
    tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    expected = {
        "gelu": tanh,
        "gelu_exact": 0.5 * x * (1 + erf),
        "relu": np.maximum(x, 0),
        "relu2": np.maximum(x, 0) ** 2,
        "swiglu": x / (1 + np.exp(-x)),
        "geglu": tanh,
    }
    for name, activation in ops.ACTIVATIONS.items():
        np.testing.assert_allclose(activation(jnp.array(x, jnp.float32)), expected[name], atol=2e-6, err_msg=name)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 1000))
def test_cross_entropy_and_its_gradient(seed, scale):
    rng = np.random.default_rng(seed)
    logits, targets = rng.normal(0, scale, (4, 9)), rng.integers(0, 9, 4)
    shifted = logits - logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(shifted).sum(-1)) + logits.max(-1)
    probabilities = np.exp(logits - log_z[:, None])
    x = jnp.array(logits, jnp.float32)
    nll, z = ops.cross_entropy(x, jnp.array(targets))
    np.testing.assert_allclose(nll, log_z - logits[np.arange(4), targets], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(z, log_z, rtol=1e-5)
    gradient = jax.grad(lambda x: ops.cross_entropy(x, jnp.array(targets))[0].sum())(x)
    np.testing.assert_allclose(gradient, probabilities - np.eye(9)[targets], atol=1e-3)


def test_softcap_is_bounded_and_keeps_small_values():
    x = jnp.array([-1e4, -0.01, 0.0, 0.01, 1e4])
    np.testing.assert_allclose(ops.softcap(x, 30.0), [-30, -0.01, 0, 0.01, 30], atol=1e-6)
    assert ops.softcap(x, None) is x


@pytest.mark.parametrize("name", ops.ACTIVATIONS)
def test_an_activation_saves_only_its_input_and_computes_in_float32(name):
    x = jnp.linspace(-6, 6, 97)
    (y, backward), (expected, reference) = (jax.vjp(f, x) for f in (partial(ops.activate, name), ops.ACTIVATIONS[name]))
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(backward(jnp.ones(97))[0], reference(jnp.ones(97))[0], rtol=1e-5, atol=1e-6)
    low_precision = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        ops.activate(name, low_precision), ops.ACTIVATIONS[name](low_precision.astype(jnp.float32)).astype(jnp.bfloat16)
    )
    saved = [x for x in jax.tree.leaves(jax.vjp(partial(ops.activate, name), low_precision)[1]) if x.size > 1]
    assert [(x.shape, x.dtype) for x in saved] == [((97,), jnp.bfloat16)]


@pytest.mark.parametrize("rate", [0.004, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("width", [1, 3, 64, 65])
def test_dropout_zeroes_elements_independently_and_keeps_the_mean(rate, width):
    x = jnp.full((400, width), 3.0)
    dropped = np.asarray(jax.vmap(lambda key: ops.dropout(x, key, rate))(jax.random.split(jax.random.key(5), 40)))
    fraction, nonzero = round(rate * 256) / 256, dropped[dropped != 0]
    assert abs(fraction - rate) <= 1 / 512 and np.allclose(nonzero, 3 / (1 - fraction), rtol=1e-6)
    zero = dropped == 0
    std = math.sqrt(fraction * (1 - fraction))
    assert abs(zero.mean() - fraction) < 4.5 * std / math.sqrt(zero.size)
    columns = zero.reshape(-1, width)
    assert (abs(columns.mean(0) - fraction) < 5 * std / math.sqrt(len(columns))).all(), (
        "every byte of a word is uniform"
    )
    if width > 1 and fraction > 0.05:  # for smaller rates the correlation is far from normal
        correlations = np.corrcoef(columns.T)[np.triu_indices(width, 1)]
        assert np.abs(correlations).max() < 6 / math.sqrt(len(columns)), "the bytes of a word are independent"


def test_dropout_keeps_the_dtype_and_has_the_gradient_of_a_mask():
    x, key = jnp.ones((4, 6), jnp.bfloat16), jax.random.key(0)
    assert ops.dropout(x, key, 0.25).dtype == jnp.bfloat16
    y, backward = jax.vjp(lambda x: ops.dropout(x, key, 0.25), x.astype(jnp.float32))
    np.testing.assert_array_equal(backward(jnp.ones_like(y))[0], y)
