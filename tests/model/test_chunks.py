"""Computation in chunks equals computation at once, and its memory grows linearly with the sequence length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import sharding
from gptjax.data.batches import Batch
from gptjax.model import attention, chunks
from gptjax.model.chunks import map_in_chunks, num_chunks
from gptjax.model.gpt import GPT, init_params
from gptjax.model.positions import AttentionMask, rope_table
from gptjax.objectives import losses
from gptjax.objectives.losses import token_nll


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 4000))
def test_num_chunks_is_the_smallest_number_within_the_limit(size, elements_per_item, limit):
    n = num_chunks(size, elements_per_item, limit)
    allowed = [k for k in range(1, size + 1) if -(-size // k) * elements_per_item <= limit]
    assert n == (allowed[0] if allowed else size)


def check_concatenated(size, chunks, axis):
    x = np.arange(2 * 3 * 5).reshape(2, 3, 5).repeat(size, axis)
    first, second = map_in_chunks(lambda pair: (pair[0] + 1, pair[1] * 2), (jnp.array(x), jnp.array(x)), chunks, axis)
    np.testing.assert_array_equal(first, x + 1)
    np.testing.assert_array_equal(second, x * 2)


@settings(max_examples=12)
@given(st.integers(1, 7), st.integers(1, 6), st.integers(0, 2))
def test_chunks_are_concatenated_in_order(size, chunks, axis):
    with jax.disable_jit():  # each size would be a program of its own
        check_concatenated(size, chunks, axis)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_compiled_chunks_are_concatenated_in_order(axis):
    check_concatenated(3, 4, axis)


KINDS = {
    "plain": {},
    "grouped, window, capped": dict(
        num_heads=4, num_kv_heads=2, sliding_window=5, attention_softcap=8.0, positions="rope"
    ),
    "ALiBi": dict(positions="alibi"),
    "encoder": dict(causal=False),
}


@pytest.mark.parametrize(
    "kind, documents",
    [
        ("plain", False),
        ("grouped, window, capped", True),
        *(pytest.param(kind, True, marks=pytest.mark.slow) for kind in ("plain", "ALiBi", "encoder")),
    ],
)
def test_chunks_have_the_losses_and_gradients_of_the_full_computation(monkeypatch, kind, documents):
    m = tiny_model(vocab_size=24, context_length=24, **KINDS[kind])
    params, rng = init_params(m, jax.random.key(0)), np.random.default_rng(1)
    tokens, targets = rng.integers(0, 24, (2, 3, 24)).astype(np.int32)
    batch = Batch(tokens, targets, np.ones((3, 24), np.float32))
    if documents:
        segments = (np.arange(24) // 9 + np.zeros((3, 1))).astype(np.int32)
        positions = (np.arange(24) % 9 + np.zeros((3, 1))).astype(np.int32)
        batch = batch._replace(segment_ids=segments, positions=positions)
        batch = batch._replace(prefix_mask=positions < 4) if m.causal and m.sliding_window is None else batch

    def compute():
        total = jax.jit(jax.value_and_grad(lambda p: jnp.square(token_nll(p, batch, GPT(m), {})[0]).sum()))
        return total(params), str(jax.make_jaxpr(total)(params)).count("scan[")

    expected, num_loops = compute()
    monkeypatch.setattr(attention, "MIN_BLOCK", 6)
    monkeypatch.setattr(attention, "MAX_SCORES", 3 * m.num_heads * 24 * 4)
    monkeypatch.setattr(losses, "LOGITS", 3 * 24 * 8)
    chunked, more_loops = compute()
    assert more_loops > num_loops
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), chunked, expected)


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("plain", "float32"),
        ("plain", "bfloat16"),
        *(pytest.param(kind, "float32", marks=pytest.mark.slow) for kind in KINDS if kind != "plain"),
    ],
)
def test_blocks_of_causal_attention_equal_full_attention_with_fewer_flops(monkeypatch, kind, dtype):
    m = tiny_model(context_length=64, dtype=dtype, **KINDS[kind])
    layer, x = attention.Attention(m), jax.random.normal(jax.random.key(0), (2, 64, m.embed_dim), dtype)
    mask = AttentionMask(jnp.arange(64), jnp.arange(64))
    rope = rope_table(m, jnp.arange(64)) if m.positions == "rope" else None
    params = layer.init(jax.random.key(1), x, rope, mask)

    def compute():
        apply = jax.jit(lambda p, x: (layer.apply(p, x, rope, mask)[0].astype(jnp.float32) ** 2).sum())
        flops = apply.lower(params, x).cost_analysis()["flops"]
        return flops, jax.jit(jax.value_and_grad(apply, argnums=(0, 1)))(params, x)

    full_flops, full = compute()
    monkeypatch.setattr(attention, "MIN_BLOCK", 16)
    flops, blocks = compute()
    assert flops < 0.9 * full_flops if m.causal else flops == full_flops
    tolerance = 1e-4 if dtype == "float32" else 0.05
    norm = lambda tree: float(sum(jnp.square(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(tree))) ** 0.5  # noqa: E731
    difference = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), blocks, full)
    assert norm(difference) <= tolerance * norm(full)


def test_every_chunk_has_its_own_dropout(monkeypatch):
    m = tiny_model(dropout=0.5, context_length=64, positions="none", causal=False)  # all queries are equal
    monkeypatch.setattr(attention, "MAX_SCORES", attention.DROPOUT_ROWS * m.num_heads * 64 * 16)
    layer, x = attention.Attention(m), jnp.ones((1, 64, m.embed_dim))
    mask = AttentionMask(jnp.arange(64), jnp.arange(64))
    params = layer.init(jax.random.key(0), x, None, mask)
    y, _ = layer.apply(params, x, None, mask, rngs={"dropout": jax.random.key(1)})
    chunks = np.asarray(y[0]).reshape(4, 16, -1)
    assert all(not np.allclose(chunks[i, -1], chunks[j, -1]) for i in range(4) for j in range(i))


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["scan", "unrolled"])
def test_memory_grows_linearly_with_the_context(monkeypatch, layers):
    monkeypatch.setattr(attention, "MAX_SCORES", 1 << 14)
    monkeypatch.setattr(losses, "LOGITS", 1 << 14)

    def temp_bytes(length):
        m = tiny_model(vocab_size=256, context_length=length, positions="rope", layers=layers)
        params = jax.eval_shape(lambda: init_params(m, jax.random.key(0)))
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        gradient = jax.jit(jax.grad(lambda p, t: token_nll(p, Batch(t, t, t), GPT(m), {})[0].sum()))
        return gradient.lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    short, long = temp_bytes(512), temp_bytes(2048)
    assert long < 4.4 * short, f"{short} bytes for 512 tokens, {long} for 2,048"


@pytest.mark.parametrize("layers, ffn", [("scan", "gelu"), ("unrolled", "swiglu")])
def test_a_layer_saves_neither_scores_nor_activations(monkeypatch, layers, ffn):
    """One more layer adds its inputs of matmuls to a step's memory, and less than half the size of its scores."""
    monkeypatch.setattr(chunks, "REMAT_THRESHOLD", 1 << 10)
    width, rows, length, heads = 32, 2, 128, 4

    def temp_bytes(num_layers):
        m = tiny_model(vocab_size=32, context_length=length, embed_dim=width, num_heads=heads, ffn=ffn, layers=layers,
                       ffn_dim=4 * width, num_layers=num_layers)  # fmt: skip
        params = jax.eval_shape(lambda: init_params(m, jax.random.key(0)))
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        gradient = jax.jit(jax.grad(lambda p, t: token_nll(p, Batch(t, t, t), GPT(m), {})[0].sum()))
        options = sharding.compiler_options(sharding.one_device())  # otherwise XLA would merge repeated computations
        return gradient.lower(params, tokens).compile(options).memory_analysis().temp_size_in_bytes

    added = (temp_bytes(6) - temp_bytes(2)) / 4
    saved = (
        (9 + 4 * (1 + (ffn == "swiglu"))) * rows * length * width * 4
    )  # residual stream, norms, queries ...; gate and up
    scores = rows * heads * length**2 * 4
    assert added < saved + scores / 2, f"{added} bytes/layer; {saved} for inputs of matmuls, {scores} for scores"
