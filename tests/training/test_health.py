"""Numbers that are not finite, and loss spikes: updates are skipped, counted, reported and diagnosed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import restored, tiny_run

from gptjax.errors import RunError, TrainingFailed
from gptjax.sharding import one_device
from gptjax.training import checkpoint, train
from gptjax.training.diagnosis import diagnose, replay
from gptjax.training.optim import make_schedule
from gptjax.training.run import open_run
from gptjax.training.state import RECENT
from gptjax.training.step import recent_loss
from gptjax.training.train_setup import build_train_setup, create_state

pytestmark = pytest.mark.usefixtures("single_device")
RARE = ord("~")
POISON = {"model.tie_embeddings": False, "train.eval_every": 0, "train.keep_last": 9, "train.checkpoint_every": 2}


def poisoned_run(folder, monkeypatch, **changes):
    """A run whose vector for "~" overflows in the first norm, and whose text has one "~".

    The arithmetic is real: 1e38 is finite, its square is not. Batches without that token are not touched by it.
    """
    e = tiny_run(folder, **POISON, **changes)
    text = (folder / "corpus.txt").read_text()
    created = create_state

    def poison(experiment, tx, abstract):
        state = created(experiment, tx, abstract)
        table = state.params["embedding"]["tokens"]
        embedding = state.params["embedding"] | {"tokens": table.at[RARE].set(1e38)}
        return state._replace(params=state.params | {"embedding": embedding})

    monkeypatch.setattr("gptjax.training.train_setup.create_state", poison)
    for place in range(500, 5000, 500):
        (folder / "corpus.txt").write_text(text[:place] + "~" + text[place + 1 :])
        batches = build_train_setup(e, one_device()).batches
        first = next(step for step in range(1000) if (batches.host_batch(step).tokens == RARE).any())
        if 3 <= first <= 12:
            break
    numbers = batches.example_ids(first).ravel()
    guilty = numbers[(batches.host_batch(first).tokens.reshape(len(numbers), -1) == RARE).any(-1)]
    return e, first + 1, guilty.tolist()


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_counted_and_found_again(tmp_path, monkeypatch, capfd):
    e, bad, guilty = poisoned_run(tmp_path, monkeypatch)
    e = e.override(
        {"train.steps": bad + 3, "optim.warmup_steps": 1, "train.checkpoint_every": 1, "train.keep_last": 99}
    )
    result = train.train(e, tmp_path / "run")
    assert result["skipped"] == 1 and result["steps"] == bad + 3
    run = open_run(tmp_path / "run")
    (event,) = [line for line in run.metrics() if "event" in line]
    first = (bad - 1) * 8
    assert event["step"] == bad and event["event"] == "skipped" and event["examples"] == [first, first + 7]
    assert "loss nan" in event["why"] and f"step {bad} was skipped" in capfd.readouterr().err
    before, after = restored(run.folder, str(bad - 1)), restored(run.folder, str(bad))
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {"step", "health.skipped", "health.in_row"}, "weights and optimizer state are unchanged"
    assert restored(run.folder, str(bad + 1))["health.in_row"] == 0

    text = "\n".join(replay(run, bad))
    assert "loss nan" in text and f"{first} to {first + 7}" in text
    assert "the first module with an output that is not finite is blocks.attention_norm of layer 0" in text
    assert f"examples whose own loss is not finite: {guilty}" in text and "~" in text
    assert "the first with a gradient that is not finite, from the loss backwards, is" in text
    rate = make_schedule(e.optim, bad + 3)
    used = {s: float(rate(s - 1 - (s > bad))) for s in range(1, bad + 4) if s != bad}  # no rate is left out for it
    for _ in range(2):
        logged = {line["step"]: line["learning_rate"] for line in run.metrics() if "learning_rate" in line}
        assert logged == pytest.approx(used)
        train.train(e, run.folder, rollback_to=bad + 1)  # and it is the same after a resume

    healthy = "\n".join(replay(run, bad + 2))
    assert "the output and the gradient of every module are finite" in healthy and "the same" in healthy
    with pytest.raises(RunError, match=f"the run has steps 1 to {bad + 3}"):
        replay(run, bad + 4)


def test_after_some_skipped_in_a_row_the_run_stops_and_names_everything(tmp_path, monkeypatch):
    e, bad, _ = poisoned_run(tmp_path, monkeypatch)
    e = e.override({"train.steps": bad + 3, "optim.warmup_steps": 1, "train.max_skipped": 1, "train.log_every": 1})
    with pytest.raises(TrainingFailed) as caught:
        train.train(e, tmp_path / "run")
    message = str(caught.value)
    for part in (f"step {bad}: 1 consecutive updates were skipped", "loss nan",
                 f"examples {8 * bad - 8} to {8 * bad - 1}", "blocks.attention_norm of layer 0",
                 f"gptjax replay {tmp_path / 'run'} --step {bad}"):  # fmt: skip
        assert part in message, part
    assert open_run(tmp_path / "run").result() is None
    found = checkpoint.listing(tmp_path / "run" / "checkpoints")
    assert all(c.step < bad and checkpoint.problem(c) is None for c in found)


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_saves_nothing_that_is_not_finite(tmp_path):
    saves = {"train.checkpoint_every": 1, "train.eval_every": 0}
    changes = {"optim.learning_rate": 1e30, "optim.clip_norm": None, "optim.warmup_steps": 0, "train.steps": 30}
    with pytest.raises(TrainingFailed, match=r"consecutive updates were skipped|not finite; the step is not saved"):
        train.train(tiny_run(tmp_path, **changes, **saves), tmp_path / "run")
    assert open_run(tmp_path / "run").result() is None
    for c in checkpoint.listing(tmp_path / "run" / "checkpoints"):
        saved = restored(tmp_path / "run", str(c.step)).values()
        assert all(np.isfinite(x).all() for x in saved if x.dtype == np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["attention.out", pytest.param("ffn.up", marks=pytest.mark.slow)])
def test_a_diagnosis_names_the_module_and_the_layer(tmp_path, where):
    """Infinite weights in layer 1: the first output that is not finite is that module's, in either direction."""
    e = tiny_run(tmp_path, **{"train.microbatches": 2, "model.dropout": 0.1, "model.remat": "full"})
    setup = build_train_setup(e, one_device())
    with jax.set_mesh(setup.mesh):
        state = create_state(setup.experiment, setup.tx, setup.abstract)
        assert diagnose(setup, state, 0).healthy
        module, weight = where.split(".")
        blocks = state.params["blocks"]
        harmed = blocks[module] | {weight: blocks[module][weight].at[1].set(jnp.inf)}
        state = state._replace(params=state.params | {"blocks": blocks | {module: harmed}})
        found = diagnose(setup, state, 0)
    assert found.forward == f"blocks.{module} of layer 1"
    assert found.backward == "final_norm", "the loss itself is not finite, so all gradients are not"
    assert len(found.samples) == 8


@pytest.mark.slow
def test_a_gradient_alone_that_is_not_finite_is_named(tmp_path):
    """Queries that are exactly 0 stay so in their norm, however they are scaled, but their gradient is too large."""
    e = tiny_run(tmp_path, **{"model.qk_norm": True, "model.norm_epsilon": 1e-36})
    setup = build_train_setup(e, one_device())
    with jax.set_mesh(setup.mesh):
        state = create_state(setup.experiment, setup.tx, setup.abstract)
        blocks = state.params["blocks"]
        query, scale = blocks["attention"]["query"].at[1].set(0.0), blocks["attention"]["query_scale"].at[1].set(1e30)
        attention = blocks["attention"] | {"query": query, "query_scale": scale}
        state = state._replace(params=state.params | {"blocks": blocks | {"attention": attention}})
        found = diagnose(setup, state, 0)
    assert np.isfinite(found.loss) and found.forward is None and not found.samples
    assert found.backward == "blocks.attention of layer 1"
    norm_alone = dataclasses.replace(found, backward=None, grad_norm=float("inf"))
    assert "gradient of every module are finite, but the gradient norm overflows" in str(norm_alone)


def test_recent_loss_is_the_mean_of_the_losses_taken_and_the_limit_is_in_sigma(tmp_path):
    e = tiny_run(tmp_path)
    setup = build_train_setup(e, one_device())
    state = create_state(setup.experiment, setup.tx, setup.abstract)
    assert recent_loss(state, 6.0)[0] == np.inf and recent_loss(state, 6.0)[1] == np.inf
    losses = np.random.default_rng(0).normal(5, 0.1, RECENT).astype(np.float32)
    for taken in (3, RECENT - 1, RECENT, RECENT + 50):
        ring = np.where(np.arange(RECENT) < taken, losses, 0)
        health = state.health._replace(losses=jnp.asarray(ring), skipped=jnp.int32(2))
        mean, limit = recent_loss(state._replace(step=jnp.int32(taken + 2), health=health), 6.0)
        assert mean == pytest.approx(losses[:taken].mean(), rel=1e-5)
        expected = losses.mean(dtype=np.float64) + 6 * losses.std(dtype=np.float64) if taken >= RECENT else np.inf
        assert limit == pytest.approx(expected, rel=1e-4)


def spiking_run(folder, **changes):
    """A run that reads one kind of text for ever, and once another: the loss of that batch is a spike."""
    e = tiny_run(
        folder, **{"train.steps": 150, "train.checkpoint_every": 0, "train.eval_every": 0, "optim.schedule": "constant"}
    )
    e = e.override({"train.log_every": 50} | changes)
    (folder / "corpus.txt").write_text("a" * 12000)
    return e


@pytest.mark.parametrize("skip", [pytest.param(None, marks=pytest.mark.slow), 6.0])
def test_a_spike_is_reported_and_skipped_if_requested(tmp_path, monkeypatch, capfd, skip):
    prepared = train.build_train_setup
    surprise = 140  # steps before it: the window of recent losses is full

    def surprising(experiment, **how):
        setup = prepared(experiment, **how)
        device_batch = setup.batches.device_batch

        def other(step, mesh):
            batch = device_batch(step, mesh)
            return batch._replace(targets=batch.targets * 0 + 7) if step == surprise else batch

        setup.batches.device_batch = other
        return setup

    monkeypatch.setattr(train, "build_train_setup", surprising)
    result = train.train(spiking_run(tmp_path, **{"train.spike_sigma": skip}), tmp_path / "run")
    (event,) = [line for line in open_run(tmp_path / "run").metrics() if "event" in line]
    assert event["step"] == surprise + 1 and event["examples"] == [surprise * 8, surprise * 8 + 7]
    assert event["event"] == ("skipped" if skip else "spike")
    assert result["skipped"] == (1 if skip else 0)
    warning = f"step {surprise + 1} was skipped" if skip else f"step {surprise + 1}: loss spike"
    assert warning in capfd.readouterr().err


def test_a_validation_loss_that_is_not_finite_never_becomes_the_best(tmp_path, monkeypatch, capfd):
    (tmp_path / "val.txt").write_text("line ~ is rare\n" * 10)
    e, _, _ = poisoned_run(tmp_path, monkeypatch, **{"data.val_source": str(tmp_path / "val.txt")})
    result = train.train(e.override({"train.steps": 4, "train.eval_every": 2}), tmp_path / "run")
    assert result["val_loss"] is None and result["best_val_loss"] is None
    assert "the validation loss is nan" in capfd.readouterr().err
    found = checkpoint.listing(tmp_path / "run" / "checkpoints")
    assert found and all(c.val_loss is None for c in found)
