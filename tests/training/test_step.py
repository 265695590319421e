"""One update: the same however the batch is cut and wherever the arrays lie."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, fine_tuning, tiny_run

from gptjax import sharding
from gptjax.data.batches import Batch
from gptjax.model import attention
from gptjax.model.gpt import GPT
from gptjax.objectives import losses as losses_module
from gptjax.objectives.losses import batch_loss, token_loss
from gptjax.training.optim import EmaState, evaluation_params, make_optimizer
from gptjax.training.state import init_state, named_key
from gptjax.training.step import eval_step, mean_gradient, train_step
from gptjax.training.train_setup import build_train_setup, first_state

MESHES = [(1, 1), (8, 1), (4, 2), (2, 4)]


def losses_on(e, data, model, steps=4, cores=1):
    """The losses of the first steps on a data x model mesh, the state after them, and the setup."""
    mesh = sharding.mesh_of(jax.devices()[: cores * data * model], data, model)
    setup = build_train_setup(e, mesh)
    with jax.set_mesh(mesh):
        state, losses = first_state(setup, None), []
        for step in range(steps):
            state, metrics = setup.train_step(state, setup.batches.device_batch(step, mesh))
            losses.append(float(metrics["loss"]))
        part = sharding.shard_from_host(next(setup.batches.validation()), ("batch", "length"), mesh)
        shown, count = setup.eval_step(state, part)
    return [*losses, float(np.sum(shown["loss"]) / np.sum(count))], state, setup


PLAIN = {"model.dropout": 0.2, "train.microbatches": 1}
RICH = {"optim.name": "muon", "model.positions": "rope", "model.num_kv_heads": 1, "model.vocab_size": 264,
        "optim.ema_decay": 0.5, "data.document_mask": True}  # fmt: skip
PRIVATE = {"optim.noise_multiplier": 0.7, "optim.clip_norm": 0.1, "train.batch_size": 32, "train.microbatches": 2}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [PLAIN, RICH, PRIVATE, None], ids=["plain", "rich", "private", "fine-tuning"])
def test_every_mesh_gives_the_same_losses(tmp_path, finished_run, changes):
    if changes is None:
        e = fine_tuning(tmp_path, finished_run, **{"optim.ema_decay": 0.5})
    else:
        e = tiny_run(tmp_path, **{"model.num_heads": 4, "model.head_dim": 8} | changes)
    expected, reference, _ = losses_on(e, 1, 1)
    meshes = [dict(data=data, model=model) for data, model in MESHES[1:]] + [dict(data=1, model=1, cores=4)]
    for mesh in meshes:
        losses, state, setup = losses_on(e, **mesh)
        np.testing.assert_allclose(losses, expected, atol=1e-5)
        assert setup.train_step._cache_size() == 1, "the layout of the state changed from step to step"
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, reference.params)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(data=4, model=2), dict(data=1, model=1, cores=4)], ids=["4 x 2", "4 cores"])
def test_parts_of_scores_and_logits_lose_the_same_on_every_mesh(tmp_path, monkeypatch, mesh):
    e = tiny_run(tmp_path, **{"model.dropout": 0.3})
    monkeypatch.setattr(attention, "MAX_SCORES", attention.DROPOUT_ROWS * 2 * 16 * 5)
    monkeypatch.setattr(losses_module, "LOGITS", 257 * 10)
    expected, losses = losses_on(e, 1, 1, steps=2)[0], losses_on(e, **mesh, steps=2)[0]
    np.testing.assert_allclose(losses, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"model.layers": "scan", "model.remat": "full"}, PRIVATE], ids=["plain", "private"]
)
def test_bfloat16_is_laid_for_cpus_on_every_mesh(tmp_path, changes):
    e = tiny_run(tmp_path, **{"model.num_heads": 4, "model.head_dim": 8, "model.dtype": "bfloat16"} | changes)
    expected = losses_on(e, 1, 1, steps=3)[0]
    for mesh in (dict(data=4, model=2), dict(data=1, model=1, cores=4)):
        np.testing.assert_allclose(losses_on(e, **mesh, steps=3)[0], expected, atol=1e-3)


@pytest.mark.slow
def test_cores_wait_for_each_other_at_one_place_at_a_time(tmp_path):
    """Two sums that could be made at once take all threads of a CPU, and leave none to a core that is waited for."""
    e = tiny_run(tmp_path, **{"train.microbatches": 1, "model.dropout": 0.1})
    mesh = sharding.mesh_of(jax.devices()[:4], 1, 1)
    setup = build_train_setup(e, mesh)
    with jax.set_mesh(mesh):
        state, batch = first_state(setup, None), setup.batches.device_batch(0, mesh)
        part = sharding.shard_from_host(next(setup.batches.validation()), ("batch", "length"), mesh)
        step, look = (
            f.lower(state, x).compile().as_text() for f, x in ((setup.train_step, batch), (setup.eval_step, part))
        )
    assert step.count(" all-reduce(") == 2, "the count, and then all that is divided by it"
    assert not re.search("all-reduce|all-gather|permute|all-to-all", look)


@pytest.mark.slow
def test_what_comes_back_to_a_layer_is_added_up_once(tmp_path):
    """Without barriers XLA adds the gradients of all later layers up again wherever one of them is needed."""
    most = []
    for layers in (3, 9):
        e = tiny_run(tmp_path, **{"model.num_layers": layers, "model.layers": "unrolled", "train.microbatches": 1})
        setup = build_train_setup(e, sharding.mesh_of(jax.devices()[:1], 1, 1))
        with jax.set_mesh(setup.mesh):
            state, batch = first_state(setup, None), setup.batches.device_batch(0, setup.mesh)
            program = setup.train_step.lower(state, batch).compile().as_text()
        joined = re.findall(r"%(\S+) = \S+ fusion\(([^)]*)\), kind=kLoop.*transpose\(jvp", program)
        most.append(max(inputs.count("%") for name, inputs in joined if "concatenate" not in name))
    assert most[0] == most[1] < 16  # 54 and 141


@pytest.mark.slow
def test_moments_lie_where_their_weights_lie(tmp_path):
    e = tiny_run(tmp_path, **{"model.num_heads": 4, "optim.ema_decay": 0.9})
    _, state, _ = losses_on(e, 4, 2, steps=1)
    layout = lambda tree: [x.sharding.spec for x in jax.tree.leaves(tree)]  # noqa: E731
    query = state.params["blocks"]["attention"]["query"]
    assert query.sharding.spec == jax.P(None, "data", "model", None)
    assert query.addressable_shards[0].data.size == query.size // 8
    kinds = (optax.ScaleByAdamState, EmaState)
    kept = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, kinds))
    adam, average = (next(s for s in kept if isinstance(s, kind)) for kind in kinds)
    assert layout(adam.mu) == layout(adam.nu) == layout(average.params) == layout(state.params)


def test_an_axis_that_does_not_divide_is_not_sharded_and_collisions_are_refused():
    mesh = {"cores": 1, "data": 4, "model": 2}
    assert sharding.partition_spec(("vocab", "embed"), (257, 16), mesh) == jax.P(None, "data")
    assert sharding.partition_spec(("vocab", "embed"), (256, 16), mesh) == jax.P("model", "data")
    with pytest.raises(ValueError, match=r"maps two of the axes .* to the same mesh axis"):
        sharding.partition_spec(("vocab", "ffn"), (4, 4), mesh)


def test_initial_weights_do_not_depend_on_the_mesh(tmp_path):
    e = tiny_run(tmp_path)
    states = [losses_on(e, data, model, steps=0)[1] for data, model in MESHES[:1] + MESHES[2:3]]
    jax.tree.map(np.testing.assert_array_equal, states[0].params, states[1].params)


def random_batch(seed, rows=8, vocab=11, length=16):
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, vocab, (2, 1, rows, length)).astype(np.int32)
    return Batch(tokens, targets, (rng.random((1, rows, length)) < 0.7).astype(np.float32))


def test_microbatches_make_the_same_update_as_the_whole_batch():
    e = TINY.override({"model.vocab_size": 11})
    tx, batch = make_optimizer(e), random_batch(0)
    state = jax.jit(lambda: init_state(e, tx))()
    step = jax.jit(partial(train_step, grad_fn=mean_gradient(GPT(e.model), token_loss(z_loss=1e-3)), tx=tx))
    whole, metrics = step(state, batch)
    for parts in (2, 8):
        cut = jax.tree.map(lambda x: x.reshape(parts, 8 // parts, -1), batch)  # noqa: B023
        other, other_metrics = step(state, cut)
        for name in metrics:
            np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=2e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), whole.params, other.params)


def test_weights_choose_which_answers_count():
    e = TINY.override({"model.vocab_size": 11})
    batch = jax.tree.map(lambda x: x[0], random_batch(1))
    params = jax.jit(lambda: init_state(e, optax.identity()).params)()
    total = jax.jit(lambda b: batch_loss(params, b, GPT(e.model), 0.0, {})[0])
    nothing = total(batch._replace(loss_weights=np.zeros_like(batch.loss_weights)))
    masks = (np.arange(16) < 8, np.arange(16) >= 8)
    halves = [total(batch._replace(loss_weights=batch.loss_weights * mask)) for mask in masks]
    assert nothing == 0
    np.testing.assert_allclose(sum(halves), total(batch), rtol=1e-5)


def test_z_loss_pulls_log_z_towards_zero():
    e = TINY.override({"model.vocab_size": 11, "model.tie_embeddings": False})
    batch = jax.tree.map(lambda x: x[0], random_batch(2))
    params = jax.jit(lambda: init_state(e, optax.identity()).params)()
    loss = lambda p, z: batch_loss(p, batch, GPT(e.model), z, {})[0]  # noqa: E731
    with_z, without = (float(jax.jit(loss, static_argnums=1)(params, z)) for z in (0.5, 0.0))
    logits = GPT(e.model).apply({"params": params}, batch.tokens)
    log_z = np.log(np.exp(np.float64(logits)).sum(-1))
    assert with_z - without == pytest.approx(0.5 * (log_z**2 * batch.loss_weights).sum(), rel=1e-4)


@pytest.mark.slow
def test_evaluation_uses_the_average_and_no_dropout():
    e = TINY.override({"model.vocab_size": 11, "model.dropout": 0.5, "optim.ema_decay": 0.5})
    tx, batch = make_optimizer(e), random_batch(3)
    state = jax.jit(lambda: init_state(e, tx))()
    how = dict(model=GPT(e.model), loss=token_loss())
    state, _ = jax.jit(partial(train_step, grad_fn=mean_gradient(**how), tx=tx))(state, batch)
    part = jax.tree.map(lambda x: x[0], batch)
    shown, count = jax.jit(partial(eval_step, **how))(state, part)
    still = GPT(dataclasses.replace(e.model, dropout=0.0))
    average = evaluation_params(state.params, state.opt_state)
    expected = jax.jit(lambda p: batch_loss(p, part, still, 0.0, {})[1])(average)
    np.testing.assert_allclose(shown["loss"], expected, rtol=1e-6)
    assert count == part.loss_weights.sum()


def test_every_use_of_randomness_has_its_own_key():
    key = jax.random.key_data(jax.random.key(3))
    names = [jax.random.key_data(named_key(key, name)).tolist() for name in ("params", "dropout", "data")]
    assert len(set(map(tuple, names))) == 3
    assert jnp.array_equal(named_key(key, "params"), named_key(key, "params"))
