"""muP: the standard parametrisation at its own width, and the scales of Yang et al. (2022, table 8) at others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, tiny_run

from gptjax.model.gpt import GPT, init_params
from gptjax.probing.coordinates import logit_changes, scaling_exponent
from gptjax.training.optim import make_optimizer

HIDDEN = ("query", "key", "value", "out", "up", "down", "gate")
MODEL = dict(vocab_size=11, num_heads=2, head_dim=64, ffn="swiglu", tie_embeddings=False, init_std=0.05)


def experiment(width, **more):
    return TINY.override(model=MODEL | dict(embed_dim=width, ffn_dim=2 * width) | more)


def names(tree):
    return {".".join(p.key for p in path): x for path, x in jax.tree.leaves_with_path(tree)}


def first_update(e, seed=0):
    """Of random weights by random gradients, without decay."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(e.model, jax.random.key(0)))
    params, grads = (jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes) for _ in "ab")
    tx = make_optimizer(e.override(optim=dict(weight_decay=0.0, clip_norm=None)))
    return names(tx.update(grads, tx.init(params), params)[0])


@pytest.mark.slow
def test_at_its_own_width_it_is_the_standard_parametrisation():
    plain, mup = experiment(16), experiment(16, mup_base_width=16)
    params = [init_params(e.model, jax.random.key(3)) for e in (plain, mup)]
    jax.tree.map(np.testing.assert_array_equal, *params)
    tokens = np.arange(8, dtype=np.int32)[None]
    logits = [GPT(e.model).apply({"params": params[0]}, tokens) for e in (plain, mup)]
    np.testing.assert_allclose(*logits, rtol=1e-6, atol=1e-7)
    for a, b in zip(first_update(plain).values(), first_update(mup).values(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_only_matrices_between_two_growing_sides_learn_more_slowly(name):
    changes = {"optim.name": name, "optim.beta2": 0.99}
    plain, mup = (first_update(experiment(16, mup_base_width=w).override(changes)) for w in (None, 4))
    for weight, update in plain.items():
        ratio = 4 if weight.rpartition(".")[2] in HIDDEN else 1
        np.testing.assert_allclose(update, ratio * mup[weight], rtol=1e-5, err_msg=weight)


def test_decay_is_the_same_at_every_width():
    """With no gradient a weight shrinks by rate times decay, muP or not."""
    e = experiment(16, mup_base_width=4)
    params = init_params(e.model, jax.random.key(0))
    tx = make_optimizer(e)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    rate = e.optim.learning_rate / (e.optim.warmup_steps + 1) * e.optim.weight_decay
    up = params["blocks"]["ffn"]["up"]
    np.testing.assert_allclose(updates["blocks"]["ffn"]["up"], -rate * up, rtol=1e-5)


def test_matrices_begin_narrower_and_the_output_is_divided():
    plain, mup = (experiment(64, mup_base_width=w) for w in (None, 16))
    weights = [names(init_params(e.model, jax.random.key(1))) for e in (plain, mup)]
    for weight, there in weights[0].items():
        ratio = 2 if weight.rpartition(".")[2] in HIDDEN else 1  # the root of 64 / 16
        np.testing.assert_allclose(there, ratio * weights[1][weight], rtol=1e-5, err_msg=weight)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 64)), jnp.float32)
    params = init_params(plain.model, jax.random.key(1))
    said = [GPT(e.model).apply({"params": params}, x, method="logits") for e in (plain, mup)]
    np.testing.assert_allclose(said[0], 4 * said[1], rtol=1e-5)


def test_scores_are_divided_by_the_width_of_a_head():
    """8 / head_dim in the place of its root: with heads of 4, four times the usual scores."""
    plain, mup = (experiment(16, mup_base_width=w, head_dim=4, num_layers=1) for w in (None, 16))
    params = init_params(plain.model, jax.random.key(2))
    attention = params["blocks"]["attention"]
    by_hand = attention | {"query": attention["query"] * 4, "query_bias": attention["query_bias"] * 4}
    scaled = params | {"blocks": params["blocks"] | {"attention": by_hand}}
    tokens = np.arange(8, dtype=np.int32)[None]
    np.testing.assert_allclose(
        GPT(mup.model).apply({"params": params}, tokens), GPT(plain.model).apply({"params": scaled}, tokens), rtol=1e-5
    )


@pytest.mark.slow
def test_logits_move_less_with_width_than_in_the_standard_parametrisation(tmp_path, single_device):
    widths = (16, 64)
    slopes = {}
    for base in (None, 16):
        e = tiny_run(tmp_path, **{"model.num_heads": 2, "optim.warmup_steps": 0, "train.batch_size": 4})
        moved = [logit_changes(e.override(model=dict(embed_dim=w, mup_base_width=base)), 2)[-1] for w in widths]
        slopes[base] = scaling_exponent(widths, moved)
    assert slopes[16] < 0.25 < slopes[None]


def test_growth_is_the_exponent():
    assert scaling_exponent((1, 2, 4), (3.0, 6.0, 12.0)) == pytest.approx(1)
    assert scaling_exponent((10, 100), (5.0, 5.0)) == pytest.approx(0, abs=1e-12)
