"""The classification head: logits and losses of a linear layer on the hidden states; every weight has a gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model

from gptjax.model import ops
from gptjax.model.gpt import GPT, init_params, weight_axes
from gptjax.model.size import num_params

BODIES = {
    "causal": {},
    "free-head": dict(tie_embeddings=False, positions="rope", norm="rmsnorm", bias=False),
    "bert": dict(causal=False, norm_placement="post", embedding_norm=True, head="mlm", ffn="gelu_exact"),
    "capped": dict(logit_softcap=0.5, ffn="swiglu"),
}
every_body = pytest.mark.parametrize("changes", BODIES.values(), ids=BODIES)


def classifier(**changes):
    """A classifier of four classes, with weights far from their initial values."""
    config = tiny_model(num_classes=4, **changes)
    params = init_params(config, jax.random.key(0))
    return config, jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params)


def tokens_of(config, rows=3, length=12):
    return np.random.default_rng(3).integers(0, config.vocab_size, (rows, length)).astype(np.int32)


@every_body
def test_logits_are_a_linear_layer_on_the_hidden_states(changes):
    """The same backbone with an identity matrix as its output head returns the hidden states."""
    config, params = classifier(**changes)
    identity = dataclasses.replace(
        config, num_classes=0, tie_embeddings=False, head="linear", vocab_size=config.embed_dim, logit_softcap=None
    )
    backbone_params = {name: part for name, part in params.items() if name != "classifier"}
    rows = np.zeros((config.embed_dim, config.embed_dim), np.float32)
    rows[: config.vocab_size] = params["embedding"]["tokens"]
    backbone_params["embedding"] = params["embedding"] | {
        "tokens": rows,
        "head": np.eye(config.embed_dim, dtype=np.float32),
    }
    tokens = tokens_of(config)
    x = np.float64(GPT(identity).apply({"params": backbone_params}, tokens))
    expected = x @ np.float64(params["classifier"]["weight"]) + np.float64(params["classifier"]["bias"])
    expected = ops.softcap(jnp.asarray(expected), config.logit_softcap)
    logits = GPT(config).apply({"params": params}, tokens)
    assert logits.shape == (3, 12, 4) and logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    unrolled = GPT(dataclasses.replace(config, layers="unrolled")).apply({"params": params}, tokens)
    np.testing.assert_allclose(unrolled, logits, atol=1e-5)


def test_the_loss_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    config, params = classifier()
    logits = np.float64(GPT(config).apply({"params": params}, tokens_of(config))).reshape(-1, 4)
    truth = np.random.default_rng(0).integers(0, 4, len(logits))
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    expected = metrics.log_loss(truth, shifted / shifted.sum(-1, keepdims=True), labels=range(4))
    assert float(ops.cross_entropy(logits, truth)[0].mean()) == pytest.approx(expected, rel=1e-6)


@every_body
def test_every_weight_has_a_gradient_and_there_is_no_token_head(changes):
    config, params = classifier(**changes)
    tokens = np.arange(11, dtype=np.int32)[None].repeat(2, 0)
    targets = np.arange(22).reshape(2, 11) % 4

    def loss(p):
        return ops.cross_entropy(GPT(config).apply({"params": p}, tokens), targets)[0].mean()

    gradient = jax.jit(jax.grad(loss))(params)
    for path, x in jax.tree.leaves_with_path(gradient):
        assert np.any(x) or path[-1].key == "key_bias", path  # a bias of keys shifts all scores of a query equally
    assert not [name for name in params["embedding"] if name.startswith(("head", "transform"))]
    assert weight_axes(config)["classifier"] == {"weight": ("embed", "classes"), "bias": ("classes",)}


def test_token_embeddings_of_a_classifier_count_no_flops():
    with_classes, tokens = (num_params(tiny_model(num_classes=n)) for n in (4, 0))
    assert with_classes["total"] == tokens["total"] + 4 * 16 + 4
    assert with_classes["multiplied"] == tokens["multiplied"] - 11 * 16 + 4 * 16 + 4
