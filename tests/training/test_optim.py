"""Optimisers against references that do not know of stacked layers, schedules against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY
from optax import contrib

from gptjax.config import OptimConfig
from gptjax.training.optim import (
    evaluation_params,
    make_optimizer,
    make_schedule,
    per_layer,
    updates_taken,
    weight_axes,
    weight_decay_mask,
)

STEPS = 20


def experiment(**optim):
    model = dict(vocab_size=11, num_heads=4, num_kv_heads=2, embed_dim=16, ffn_dim=24)
    return TINY.override(model=model, optim=dict(warmup_steps=2) | optim, train=dict(steps=STEPS))


def trees(e, count, seed=0):
    """Random trees in the shape of the params: the params, then gradients."""
    from gptjax.model.gpt import init_params

    shapes = jax.eval_shape(lambda: init_params(e.model, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes) for _ in range(count)]


def run(tx, params, gradients):
    @jax.jit
    def all_updates(params):
        state = tx.init(params)
        for gradient in gradients:
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    return all_updates(params)


def test_adamw_is_the_float64_formula():
    e = experiment(name="adamw", clip_norm=0.5, weight_decay=0.3)
    params, *gradients = trees(e, 4)
    moved, _ = run(make_optimizer(e), params, gradients)
    rate, masks = make_schedule(e.optim, STEPS), weight_decay_mask(weight_axes(e.model))
    norms = [math.sqrt(sum(float((np.float64(g) ** 2).sum()) for g in jax.tree.leaves(t))) for t in gradients]

    def expected(p, masked, *gs):
        p, m, v = np.float64(p), 0.0, 0.0
        for t, (g, norm) in enumerate(zip(gs, norms, strict=True), 1):
            g = np.float64(g) * min(1, 0.5 / norm)
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
            step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
            p = p - float(rate(t - 1)) * (step + (0.3 * p if masked else 0))
        return p

    wanted = jax.tree.map(expected, params, masks, *gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), moved, wanted)


def test_only_matrices_and_embeddings_decay():
    masks = weight_decay_mask(weight_axes(experiment().model))
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): m for path, m in jax.tree.leaves_with_path(masks)}
    decays = {name for name, mask in flat.items() if mask}
    matrices = {f"blocks.attention.{name}" for name in ("query", "key", "value", "out")}
    assert decays == matrices | {"blocks.ffn.up", "blocks.ffn.down", "embedding.tokens", "embedding.positions"}


def sliced(tree, layer):
    """One layer's weights as plain matrices and vectors, heads joined."""

    def one(path, x):
        name = path[-1].key
        x = x[layer]
        if name in ("query", "key", "value"):
            return x.reshape(x.shape[0], -1)
        return x.reshape(-1, x.shape[-1]) if name == "out" else x.reshape(-1) if name.endswith("_bias") else x

    return jax.tree.map_with_path(one, tree["blocks"])


@pytest.mark.slow
def test_muon_treats_every_layer_as_plain_muon_does():
    e = experiment(name="muon", clip_norm=None, weight_decay=0.1)
    params, *gradients = trees(e, 3)
    moved, _ = run(make_optimizer(e), params, gradients)
    rate = make_schedule(e.optim, STEPS)
    plain = contrib.muon(rate, beta=0.9, weight_decay=0.1, adam_b1=0.9, adam_b2=0.99, consistent_rms=0.2)
    for layer in range(2):
        alone = [{k: v for k, v in flat_matrices(sliced(t, layer)).items()} for t in (params, *gradients)]
        expected, _ = run(plain, alone[0], alone[1:])
        got = flat_matrices(sliced(moved, layer))
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], atol=2e-5, err_msg=name)
    # embeddings are not orthogonalised: they move as AdamW moves them
    adam = optax.adamw(rate, 0.9, 0.99, weight_decay=0.1, nesterov=True)
    expected, _ = run(adam, params["embedding"], [g["embedding"] for g in gradients])
    np.testing.assert_allclose(moved["embedding"]["tokens"], expected["tokens"], atol=2e-6)


def flat_matrices(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): x for path, x in leaves if x.ndim == 2}


def test_adafactor_factors_every_layer_alone():
    e = experiment(name="adafactor")
    params, *gradients = trees(e, 3)
    inner = optax.scale_by_factored_rms(min_dim_size_to_factor=8)
    moved, state = run(per_layer(inner, weight_axes(e.model)), params, gradients)
    for layer in range(2):
        expected, _ = run(inner, sliced(params, layer), [sliced(g, layer) for g in gradients])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), sliced(moved, layer), expected)
    kept = sum(x.size for x in jax.tree.leaves(state))
    assert kept < sum(x.size for x in jax.tree.leaves(params)), "factored moments are smaller than the weights"


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd", "muon", "schedule_free"])
def test_every_optimiser_descends(name):
    e = experiment(name=name, learning_rate=0.02, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_norm=None)
    (target,) = trees(e, 1)
    params = jax.tree.map(jnp.zeros_like, target)
    tx = make_optimizer(e)

    def distance(p):
        parts = jax.tree.map(lambda a, b: jnp.square(a - b).mean(), p, target)
        return sum(jax.tree.leaves(parts))

    @jax.jit
    def descend(params):
        def backbone_params(_, carry):
            params, state = carry
            updates, state = tx.update(jax.grad(distance)(params), state, params)
            return optax.apply_updates(params, updates), state

        params, state = jax.lax.fori_loop(0, 40, backbone_params, (params, tx.init(params)))
        return distance(params), distance(evaluation_params(params, state))

    start = float(distance(params))
    end, averaged = (float(x) for x in descend(params))
    assert end < 0.98 * start and averaged < 0.99 * start


def test_schedules_are_their_formulas():
    def rates(**changes):
        o = OptimConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10, **changes)
        return np.array(jax.vmap(make_schedule(o, 110))(jnp.arange(110)), np.float64)

    warm = np.arange(1, 11) / 11
    progress = np.arange(100) / 99
    formulas = {
        "cosine": 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * progress)),
        "linear": 1 - 0.9 * progress,
        "constant": np.ones(100),
        "wsd": 0.1 + 0.9 * (1 - np.sqrt(np.clip((np.arange(10, 110) - 87) / 22, 0, 1))),
    }
    for name, formula in formulas.items():
        np.testing.assert_allclose(rates(schedule=name), np.concatenate([warm, formula]), atol=1e-6, err_msg=name)


def test_the_average_is_the_float64_average():
    e = experiment(name="sgd", ema_decay=0.8, clip_norm=None)
    params, *gradients = trees(e, 4)
    average = np.float64(params["final_norm"]["scale"])
    for count in range(1, 4):
        moved, state = run(make_optimizer(e), params, gradients[:count])
        average = 0.8 * average + 0.2 * np.float64(moved["final_norm"]["scale"])
    kept = evaluation_params(moved, state)
    np.testing.assert_allclose(kept["final_norm"]["scale"], average, atol=1e-6)
    assert evaluation_params(moved, optax.EmptyState()) is moved


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor", "sgd"])
def test_with_no_gradient_only_what_decays_moves(name):
    e = experiment(name=name, weight_decay=0.5, learning_rate=0.1, warmup_steps=0)
    params, like = trees(e, 2)
    moved, _ = run(make_optimizer(e), params, [jax.tree.map(jnp.zeros_like, like)])
    masks = weight_decay_mask(weight_axes(e.model))
    jax.tree.map(lambda p, q, m: np.testing.assert_allclose(q, p * (0.95 if m else 1), rtol=1e-5), params, moved, masks)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor", "muon", "schedule_free"])
def test_every_rule_counts_the_updates_that_its_schedule_has_seen(name):
    e = experiment(name=name, schedule="constant", ema_decay=None if name == "schedule_free" else 0.9)
    params, *gradients = trees(e, 4)
    assert updates_taken(make_optimizer(e).init(params)) == 0
    assert updates_taken(run(make_optimizer(e), params, gradients)[1]) == 3
