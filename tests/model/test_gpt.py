"""Properties of every model, whatever its mechanisms, tested by gradients and by comparing models."""

import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model

from gptjax.inference.cache import cache_bytes, empty_cache
from gptjax.model import attention, ops
from gptjax.model.gpt import GPT, decode_step, init_params, unembed, unstack_layers, weight_axes
from gptjax.model.kernels import choose_kernel
from gptjax.model.positions import AttentionMask, rope_table
from gptjax.model.size import flops_per_token, num_params

# each mechanism once at least; a compiled program is dear, so some share one
VARIANTS = {
    "learned": {},
    "rope": dict(positions="rope"),
    "yarn-rmsnorm-post": dict(
        positions="rope", rope_scaling="yarn", rope_factor=2.0, norm="rmsnorm", norm_placement="post"
    ),
    "alibi-layernorm-post": dict(positions="alibi", norm_placement="post", bias=False),
    "none-swiglu-untied": dict(positions="none", ffn="swiglu", tie_embeddings=False, bias=False),
    "gqa": dict(num_heads=4, num_kv_heads=2, positions="rope"),
    "mqa-geglu": dict(num_heads=4, num_kv_heads=1, head_dim=6, ffn="geglu"),
    "window": dict(sliding_window=3),
    "window-alibi-caps": dict(sliding_window=4, positions="alibi", attention_softcap=5.0, logit_softcap=3.0),
    "neox": dict(positions="rope", partial_rotary_factor=0.25, parallel_residual=True, ffn="gelu_exact"),
    "llama3-qk-norm": dict(positions="rope", rope_scaling="llama3", rope_factor=2.0, qk_norm=True, ffn="relu2"),
    "bert": dict(norm_placement="post", embedding_norm=True, head="mlm", ffn="gelu_exact"),
    "mup": dict(mup_base_width=8, tie_embeddings=False),
    "attention-only": dict(ffn="none", positions="rope"),
    "attention-only-post": dict(ffn="none", norm_placement="post"),
    "relu-bfloat16": dict(ffn="relu", dtype="bfloat16"),
}
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
QUICK = ("learned", "gqa", "window-alibi-caps", "llama3-qk-norm", "relu-bfloat16")
# of tests that compile much; the others are for `pytest -m slow`
every_variant_if_slow = pytest.mark.parametrize(
    "changes",
    [pytest.param(changes, marks=[] if name in QUICK else pytest.mark.slow) for name, changes in VARIANTS.items()],
    ids=VARIANTS,
)


def random_params(config, seed=0):
    """Weights far from their small initial values, biases included, so that every path matters. Compiles nothing."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def draw(path, x):
        centre = 1.0 if path[-1].key.endswith("scale") else 0.0
        return jnp.asarray((centre + 0.2 * rng.normal(size=x.shape)).astype(np.float32))

    return jax.tree.map_with_path(draw, shapes)


def random_tokens(config, rows=2, length=12, seed=3):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length)).astype(np.int32)


def logits_of(config, params, tokens, **inputs):
    return jax.jit(lambda p, t: GPT(config).apply({"params": p}, t, **inputs))(params, tokens)


def influence(config, params, tokens, segment_ids=None, positions=None, prefix_mask=None):
    """|d logits at position i / d embedding at position j|, summed over everything else: [length, length]."""
    index = jnp.arange(tokens.shape[1])
    rope_positions = index if positions is None else positions

    def from_embeddings(module, x):
        rope = rope_table(config, rope_positions) if config.positions == "rope" else None
        y, _ = module.blocks(x, rope, AttentionMask(index, index, segment_ids, segment_ids, prefix_mask))
        logits = module.logits(module.final_norm(y) if config.norm_placement == "pre" else y)
        return logits[0].astype(jnp.float32)

    @jax.jit
    def jacobian():
        x = GPT(config).apply({"params": params}, tokens, index, method=lambda m, t, p: m.embedding.embed(t, p))
        run = lambda x: GPT(config).apply({"params": params}, x, method=from_embeddings)  # noqa: E731
        return jnp.abs(jax.jacrev(run)(x).astype(jnp.float32)).sum((1, 2, 4))

    return np.array(jacobian())


@every_variant_if_slow
def test_no_token_attends_to_a_later_one(changes):
    config = tiny_model(**changes)
    seen = influence(config, random_params(config), random_tokens(config, rows=1, length=8))
    assert np.all(np.triu(seen, 1) == 0), "a later token changed an earlier logit"
    receptive_field = np.tril(np.ones((8, 8)))
    if config.sliding_window:  # one layer reaches window - 1 back, two layers twice that
        distance = np.arange(8)[:, None] - np.arange(8)
        receptive_field *= distance <= config.num_layers * (config.sliding_window - 1)
    assert np.all((seen > 0) == (receptive_field > 0)), "a token did not attend to all that it should"


def test_a_bidirectional_model_attends_to_everything():
    config = tiny_model(causal=False)
    assert np.all(influence(config, random_params(config), random_tokens(config, rows=1, length=6)) > 0)


@every_variant_if_slow
def test_documents_do_not_leak(changes):
    config = tiny_model(**changes)
    params = random_params(config)
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 2, 2, 3]])
    positions = jnp.array([[0, 1, 2, 0, 1, 2, 3, 0]])
    seen = influence(config, params, random_tokens(config, rows=1, length=8), segment_ids, positions)
    other_document = np.array(segment_ids[0][:, None] != segment_ids[0][None, :])
    assert np.all(seen[other_document] == 0)

    tokens = random_tokens(config, rows=1, length=8)
    packed = logits_of(config, params, tokens, segment_ids=segment_ids, positions=positions)
    alone = logits_of(config, params, tokens[:, 3:7])
    tolerance = 0.05 if config.dtype == "bfloat16" else 2e-5
    np.testing.assert_allclose(packed[:, 3:7], alone, atol=tolerance)


some_variants = pytest.mark.parametrize(
    "name", ["learned", "gqa", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rope", "window-alibi-caps"))]
)
PACKED = dict(
    segment_ids=jnp.array([[1, 1, 1, 1, 2, 2, 2, 2]]),
    positions=jnp.array([[0, 1, 2, 3, 0, 1, 2, 3]]),
    prefix_mask=jnp.array([[True, True, False, False, True, True, True, False]]),
)


@some_variants
def test_all_tokens_of_a_document_attend_to_its_prefix_and_no_others_do(name):
    """By gradient and by value: a target changes no logit before it, a prefix token all logits of its document."""
    config = tiny_model(**VARIANTS[name])
    params, tokens = random_params(config), random_tokens(config, rows=1, length=8)
    seen = influence(config, params, tokens, **PACKED)
    later, in_prefix = np.triu(np.ones((8, 8), bool), 1), np.array(PACKED["prefix_mask"][0])[None, :]
    same = np.array(PACKED["segment_ids"][0][:, None] == PACKED["segment_ids"][0])
    assert np.all(seen[~same] == 0), "a token attended to another document"
    assert np.all(seen[later & ~in_prefix] == 0), "a token attended to a later target"
    if config.sliding_window is None:
        assert np.all(seen[same & (~later | in_prefix)] > 0), "a token did not attend to the full prefix"

    logits = np.array(logits_of(config, params, tokens, **PACKED))
    for changed in range(8):
        other = tokens.copy()
        other[0, changed] = (other[0, changed] + 1) % config.vocab_size
        changed_logits = np.any(np.array(logits_of(config, params, other, **PACKED)) != logits, -1)[0]
        may_change = same[:, changed] & (~later[:, changed] | in_prefix[0, changed])
        assert not np.any(changed_logits & ~may_change), "other logits must stay bitwise equal"
        assert changed_logits[changed] and (config.sliding_window or np.all(changed_logits == may_change))


@some_variants
def test_packed_documents_with_a_prefix_have_the_logits_of_single_documents(name):
    config = tiny_model(**VARIANTS[name])
    params, tokens = random_params(config), random_tokens(config, rows=1, length=8)
    packed = logits_of(config, params, tokens, **PACKED)
    for here in (slice(0, 4), slice(4, 8)):
        alone = logits_of(config, params, tokens[:, here], prefix_mask=PACKED["prefix_mask"][:, here])
        np.testing.assert_allclose(packed[:, here], alone, atol=2e-5)


def test_a_prefix_of_everything_is_the_bidirectional_model():
    params, tokens = random_params(tiny_model()), random_tokens(tiny_model())
    everything = logits_of(tiny_model(), params, tokens, prefix_mask=jnp.ones(tokens.shape, bool))
    np.testing.assert_allclose(everything, logits_of(tiny_model(causal=False), params, tokens), atol=1e-6)


@every_variant_if_slow
def test_the_cache_changes_nothing(changes):
    """Two sequences, one two tokens longer, in several steps; with a sliding window the cache overwrites old tokens."""
    config = tiny_model(**changes)
    params, tokens = random_params(config), random_tokens(config)
    expected = np.array(logits_of(config, params, tokens))
    slots = 6 if config.sliding_window else 16
    cache = empty_cache(config, 2, slots)
    assert sum(x.nbytes for x in jax.tree.leaves(cache)) == cache_bytes(config, 2, slots)

    @partial(jax.jit, static_argnames="prefill")
    def step(params, tokens, positions, cache, prefill=False):
        x, cache = decode_step(config, params, tokens, positions, cache, prefill)
        return unembed(config, params, x), cache

    params = unstack_layers(params)
    ahead = np.array([[2], [0]])
    positions = np.arange(7) + 0 * ahead
    positions[1, 5:] = -1
    first, cache = step(params, np.where(positions < 0, 0, tokens[:, :7]), positions, cache, prefill=True)
    tolerance = 0.06 if config.dtype == "bfloat16" else 2e-5
    np.testing.assert_allclose(first[0], expected[0, :7], atol=tolerance)
    np.testing.assert_allclose(first[1, :5], expected[1, :5], atol=tolerance)
    for i, width in [(5, 1), (6, 3), (9, 1)]:
        positions = i + ahead + np.arange(width)
        logits, cache = step(params, np.take_along_axis(tokens, positions, 1), positions, cache)
        np.testing.assert_allclose(logits, np.take_along_axis(expected, positions[..., None], 1), atol=tolerance)


@every_variant
def test_no_dtype_is_promoted_implicitly(changes):
    """In the loss and its gradient; traced only, which needs no compilation."""
    model = tiny_model(**changes)
    params, tokens = random_params(model), random_tokens(model)

    def loss(p):
        return ops.cross_entropy(GPT(model).apply({"params": p}, tokens), tokens)[0].mean()

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(jax.grad(loss), params)


RICH = dict(dropout=0.3, positions="rope", ffn="swiglu")


@pytest.mark.parametrize("changes", [{}, pytest.param(RICH, marks=pytest.mark.slow)], ids=["plain", "dropout"])
def test_scan_unrolled_and_remat_are_one_model(changes):
    def loss_and_gradient(**execution):
        config = tiny_model(**changes, **execution)
        tokens = random_tokens(config)
        rngs = {"dropout": jax.random.key(7)} if config.dropout else {}

        def loss(p):
            return ops.cross_entropy(GPT(config).apply({"params": p}, tokens, rngs=rngs), tokens)[0].mean()

        return jax.jit(jax.value_and_grad(loss))(random_params(tiny_model(**changes)))

    loss, gradient = loss_and_gradient(layers="scan")
    for layers, remat in [("unrolled", "none"), ("scan", "dots"), ("unrolled", "full")]:
        other_loss, other = loss_and_gradient(layers=layers, remat=remat)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, other)


def test_scan_and_unrolled_have_the_same_initial_weights():
    scan, unrolled = (init_params(tiny_model(layers=how), jax.random.key(0)) for how in ("scan", "unrolled"))
    jax.tree.map(np.testing.assert_array_equal, scan, unrolled)


def test_gqa_with_as_many_key_heads_as_heads_is_bitwise_mha():
    plain, grouped = tiny_model(num_heads=4), tiny_model(num_heads=4, num_kv_heads=4)
    params, tokens = random_params(plain), random_tokens(plain)
    np.testing.assert_array_equal(logits_of(plain, params, tokens), logits_of(grouped, params, tokens))


def test_gqa_is_mha_with_repeated_key_heads():
    grouped, full = tiny_model(num_heads=4, num_kv_heads=2), tiny_model(num_heads=4)
    params, tokens = random_params(grouped), random_tokens(grouped)
    repeated = jax.tree.map(lambda x: x, params)
    for name in ("key", "value", "key_bias", "value_bias"):
        repeated["blocks"]["attention"][name] = jnp.repeat(params["blocks"]["attention"][name], 2, axis=-2)
    np.testing.assert_allclose(logits_of(grouped, params, tokens), logits_of(full, repeated, tokens), atol=2e-6)


def test_a_window_as_long_as_the_sequence_is_full_attention():
    full, windowed = tiny_model(), tiny_model(sliding_window=12)
    params, tokens = random_params(full), random_tokens(full, length=12)
    np.testing.assert_array_equal(logits_of(full, params, tokens), logits_of(windowed, params, tokens))


@every_variant
def test_axes_name_the_shape_of_every_weight(changes):
    config = tiny_model(**changes)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    axes = weight_axes(config)
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    assert jax.tree.structure(params) == jax.tree.structure(jax.tree.map(lambda a: 0, axes, is_leaf=is_axes))
    for x, names in zip(jax.tree.leaves(params), jax.tree.leaves(axes, is_leaf=is_axes), strict=True):
        assert x.ndim == len(names) and x.dtype == jnp.float32
    assert num_params(config)["total"] == sum(x.size for x in jax.tree.leaves(params))


def test_initial_weights_are_as_published():
    config = tiny_model(embed_dim=128, num_layers=8, num_heads=4, vocab_size=1000)
    params = init_params(config, jax.random.key(0))
    attention, ffn = params["blocks"]["attention"], params["blocks"]["ffn"]
    for weight in (attention["query"], attention["value"], ffn["up"], params["embedding"]["tokens"]):
        assert weight.std() == pytest.approx(0.02, rel=0.02)
    for weight in (attention["out"], ffn["down"]):  # GPT-2: divided by the root of the number of residual branches
        assert weight.std() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert not any(x.any() for x in (attention["query_bias"], ffn["down_bias"]))
    layers = attention["query"]
    assert not np.allclose(layers[0], layers[1]) and not np.allclose(attention["query"], attention["key"])


def test_dropout_needs_a_key():
    config = tiny_model(dropout=0.5)
    params, tokens = random_params(config), random_tokens(config)
    apply = jax.jit(lambda seed: GPT(config).apply({"params": params}, tokens, rngs={"dropout": jax.random.key(seed)}))
    np.testing.assert_array_equal(apply(0), apply(0))
    assert not np.allclose(apply(0), apply(1))
    without_dropout = tiny_model()
    np.testing.assert_array_equal(logits_of(config, params, tokens), logits_of(without_dropout, params, tokens))


def on_gpu(monkeypatch, capability: str) -> None:
    """Fakes the compute capability that JAX reports; other strings are for devices that are not NVIDIA's."""
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])


def test_the_choice_of_the_kernel_has_a_reason(monkeypatch):
    on_gpu(monkeypatch, "9.0")
    fused = tiny_model(dtype="bfloat16")
    assert choose_kernel(fused, backend="gpu")[0] == "cudnn"
    assert choose_kernel(fused, backend="cpu") == ("xla", "on cpu")
    assert choose_kernel(tiny_model(dtype="bfloat16", attention_kernel="xla"), backend="gpu") == ("xla", "requested")
    kernel, why = choose_kernel(tiny_model(dtype="bfloat16", attention_softcap=30.0, dropout=0.1), backend="gpu")
    assert kernel == "xla" and "soft-cap" in why and "dropout" in why


@pytest.mark.parametrize(
    "capability, head_dim, obstacle",
    [
        ("7.5", 64, "compute capability 8.0"),
        ("gfx942", 64, "NVIDIA"),
        ("8.0", 128, None),
        ("8.0", 136, "at most 128"),
        ("9.0", 136, None),
        ("10.0", 256, None),
        ("12.0", 264, "at most 256"),
    ],
)
def test_cudnn_is_not_chosen_for_heads_that_it_does_not_support(monkeypatch, capability, head_dim, obstacle):
    on_gpu(monkeypatch, capability)
    for requested in ("auto", "cudnn"):
        kernel, why = choose_kernel(
            tiny_model(dtype="bfloat16", head_dim=head_dim, attention_kernel=requested), backend="gpu"
        )
        assert kernel == ("cudnn" if obstacle is None else "xla") and (obstacle or "") in why


@pytest.mark.slow
def test_training_with_a_mask_and_an_odd_length_uses_xla(monkeypatch):
    """cuDNN has no gradient for it. Attention passes the length and whether there is a mask to `choose_kernel`."""
    on_gpu(monkeypatch, "9.0")
    chosen = []

    def record(config, *args):
        chosen.append(choose_kernel(config, *args, backend="gpu"))
        return "xla", "on cpu"

    monkeypatch.setattr(attention, "choose_kernel", record)

    def kernel(length: int, *, segments: bool = False, **changes) -> tuple[str, str]:
        config = tiny_model(dtype="bfloat16", **changes)
        inputs = (None, jnp.ones((1, length), jnp.int32)) if segments else ()
        GPT(config).apply({"params": random_params(config)}, random_tokens(config)[:1, :length], *inputs)
        return chosen[-1]

    assert kernel(9)[0] == kernel(10, sliding_window=4)[0] == kernel(10, segments=True)[0] == "cudnn"
    for masked in (kernel(9, sliding_window=4), kernel(9, positions="alibi"), kernel(9, segments=True)):
        assert masked[0] == "xla" and "even context_length" in masked[1]


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_block_without_ffn_equals_a_block_whose_ffn_adds_zero(placement):
    with_ffn, without_ffn = (tiny_model(ffn=ffn, norm_placement="pre") for ffn in ("gelu", "none"))
    if placement == "post":  # the norm after the FFN remains, so it must not change anything
        with_ffn, without_ffn = (
            tiny_model(ffn=ffn, norm_placement="post", bias=False, norm="rmsnorm") for ffn in ("gelu", "none")
        )
    params = random_params(with_ffn)
    blocks = dict(params["blocks"])
    blocks["ffn"] = jax.tree.map(jnp.zeros_like, blocks["ffn"])
    if placement == "post":  # unit scales: normalizing twice changes nothing
        blocks |= {name: {"scale": jnp.ones_like(blocks[name]["scale"])} for name in ("attention_norm", "ffn_norm")}
    params = params | {"blocks": blocks}
    kept = {name: part for name, part in blocks.items() if not name.startswith("ffn")}
    tokens = random_tokens(with_ffn)
    np.testing.assert_allclose(
        logits_of(with_ffn, params, tokens),
        logits_of(without_ffn, params | {"blocks": kept}, tokens),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_model_without_ffn_has_the_weights_and_flops_of_attention():
    m = tiny_model(ffn="none", bias=False, num_layers=3)
    sizes = num_params(m)
    blocks = 3 * (4 * m.embed_dim**2 + m.embed_dim)  # query, key, value, out, and one norm
    assert sizes["total"] == blocks + m.embed_dim + (m.vocab_size + m.context_length) * m.embed_dim
    assert flops_per_token(m) == 6 * sizes["multiplied"] + 12 * 3 * m.embed_dim * m.context_length
    spread = np.std(init_params(tiny_model(ffn="none", embed_dim=64), jax.random.key(0))["blocks"]["attention"]["out"])
    assert spread == pytest.approx(0.02 / 2**0.5, rel=0.03), "two layers of one branch each"
