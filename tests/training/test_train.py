"""A whole run: what it leaves, that it can be stopped anywhere and goes on bit for bit, and what it refuses."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import tiny_run

from gptjax.errors import ConfigError, DataError, RunError, TrainingFailed
from gptjax.training import checkpoint, loop, train
from gptjax.training.evaluation import evaluate_run
from gptjax.training.metrics import flops_per_token, num_params
from gptjax.training.run import open_run
from gptjax.training.workshop import load_params, one_device, prepare

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def single_device(monkeypatch):
    """Runs on one of the eight devices, so that batches need not divide by eight and compiling is quick."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr("gptjax.sharding.make_mesh", lambda mesh: one_device())


def saved_state(folder, step):
    """Everything that a checkpoint holds, as host arrays."""
    run = open_run(folder)
    shop = prepare(run.experiment, one_device())
    return jax.tree.map(np.array, checkpoint.restore(checkpoint.choose(run.checkpoints, str(step)), shop.abstract))


def test_a_run_leaves_everything_that_is_promised(tmp_path):
    e = tiny_run(tmp_path, **{"train.track": ("tensorboard",)})
    figures = train.train(e, tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.result() == {"format": 1} | figures
    wanted = {"val_loss", "val_bits_per_byte", "steps", "tokens", "seconds", "tokens_per_second", "num_params"}
    assert wanted <= figures.keys()
    assert figures["steps"] == 6 and figures["tokens"] == 6 * 8 * 16
    assert figures["num_params"] == num_params(run.experiment.model)["total"]
    assert run.experiment == e.resolved(257)
    lines = run.metrics()
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4, 5, 6]
    assert [x["step"] for x in lines if "val_loss" in x] == [3, 6]
    assert lines[-1]["val_loss"] == figures["val_loss"]
    assert {"data", "versions", "devices", "command"} <= run.provenance().keys()
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    # byte tokens: a nat a token is 1 / ln 2 bits a byte, but for the end of text, which has no byte
    assert figures["val_bytes"] == figures["val_tokens"] - 1
    bits = figures["val_loss"] * figures["val_tokens"] / np.log(2) / figures["val_bytes"]
    assert figures["val_bits_per_byte"] == pytest.approx(bits)

    (run.folder / "result.json").unlink()  # as if killed after the last checkpoint: only the figures are made again
    assert train.train(e, tmp_path / "run")["val_loss"] == figures["val_loss"]

    before = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")}
    assert train.train(e, tmp_path / "run") == run.result(), "a finished run is left alone"
    assert before == {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")}
    # the figures of a run are those that evaluating its last checkpoint gives
    (tmp_path / "corpus.txt").unlink()  # its tokens are in the cache
    again = evaluate_run(run)
    assert again["val_loss"] == pytest.approx(figures["val_loss"], rel=1e-6)


def test_nothing_is_recompiled_in_a_run_with_evaluation(tmp_path, monkeypatch):
    shops = []
    prepared = train.prepare
    monkeypatch.setattr(train, "prepare", lambda e: shops.append(prepared(e)) or shops[-1])
    train.train(tiny_run(tmp_path, **{"train.microbatches": 2}), tmp_path / "run")
    assert shops[0].train_step._cache_size() == 1
    assert shops[0].eval_step._cache_size() == 1


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"model.dropout": 0.1, "train.microbatches": 2, "optim.ema_decay": 0.9}, id="adamw"),
        pytest.param({"optim.name": "muon", "data.tokenizer": "char"}, id="muon", marks=pytest.mark.slow),
        pytest.param({"optim.name": "schedule_free", "optim.schedule": "constant"}, id="free", marks=pytest.mark.slow),
        pytest.param({"optim.name": "adafactor"}, id="adafactor", marks=pytest.mark.slow),
        pytest.param({"optim.name": "lion"}, id="lion", marks=pytest.mark.slow),
    ],
)
def test_a_run_in_pieces_is_the_unbroken_run_bit_for_bit(tmp_path, changes, monkeypatch):
    e = tiny_run(tmp_path, **changes, **{"train.keep_last": 9, "train.checkpoint_every": 2})
    whole = train.train(e, tmp_path / "whole")
    # stopped after steps 1 and 4, each time by the signal that a scheduler sends
    real = loop.stop_requests
    for stop in (1, 4):
        calls = iter(range(1000))

        class stopping:
            def __enter__(self):
                first = max((c.step for c in checkpoint.listing(tmp_path / "parts" / "checkpoints")), default=0)
                return lambda: "SIGTERM" if first + next(calls) + 1 >= stop else None  # noqa: B023

            def __exit__(self, *_):
                return None

        monkeypatch.setattr(loop, "stop_requests", stopping)
        with pytest.raises(loop.Interrupted, match=f"step {stop} is saved"):
            train.train(e, tmp_path / "parts")
    monkeypatch.setattr(loop, "stop_requests", real)
    parts = train.train(e, tmp_path / "parts", resume=True)
    for step in (2, 4, 6):
        states = (saved_state(tmp_path / name, step) for name in ("whole", "parts"))
        jax.tree.map(np.testing.assert_array_equal, *states)
    assert parts["val_loss"] == whole["val_loss"] and parts["best_val_loss"] == whole["best_val_loss"]
    lines = [open_run(tmp_path / name).metrics() for name in ("whole", "parts")]
    losses, expected = ([(x["step"], x["loss"]) for x in part if "loss" in x] for part in lines)
    assert losses == expected, "metrics.jsonl has every step once, with the same loss"


def test_last_and_best_checkpoints_are_kept(tmp_path):
    e = tiny_run(
        tmp_path, **{"train.steps": 8, "train.checkpoint_every": 1, "train.eval_every": 1, "train.keep_last": 2}
    )
    train.train(e, tmp_path / "run")
    run = open_run(tmp_path / "run")
    losses = {x["step"]: x["val_loss"] for x in run.metrics() if "val_loss" in x}
    best = min(losses, key=losses.__getitem__)
    assert [c.step for c in checkpoint.listing(run.checkpoints)] == sorted({7, 8, best})
    assert checkpoint.choose(run.checkpoints, "best").step == best
    assert load_params(run, "last")[1] == 8
    with pytest.raises(RunError, match="has no checkpoint '3'; there are last, best and the steps"):
        checkpoint.choose(run.checkpoints, "3")


def test_a_damaged_checkpoint_is_never_loaded(tmp_path):
    train.train(tiny_run(tmp_path), tmp_path / "run")
    run = open_run(tmp_path / "run")
    last = checkpoint.choose(run.checkpoints)
    name, (size, _) = max(last.files.items(), key=lambda item: item[1][0])
    path = last.folder / "arrays" / name
    content = bytearray(path.read_bytes())
    content[size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="is not what was written"):
        load_params(run, "last")
    path.unlink()
    with pytest.raises(RunError, match="is missing"):
        load_params(run, "last")
    (last.folder / checkpoint.NOTE).unlink()  # without its note it is no checkpoint at all
    assert checkpoint.choose(run.checkpoints).step < last.step


def test_another_experiment_in_the_folder_is_refused_with_the_difference(tmp_path):
    e = tiny_run(tmp_path)
    train.train(e, tmp_path / "run")
    with pytest.raises(RunError) as caught:
        train.train(e.override({"optim.learning_rate": 0.5, "seed": 3}), tmp_path / "run")
    assert "optim.learning_rate: 0.01 there, 0.5 now" in str(caught.value) and "seed: 0 there, 3 now" in str(
        caught.value
    )
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(corpus.read_text()[:-1] + "!")
    with pytest.raises(RunError, match="was trained on data"):
        train.train(e, tmp_path / "run")


def test_folders_that_cannot_hold_a_run_are_refused(tmp_path):
    e = tiny_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        train.train(e, tmp_path / "file")
    with pytest.raises(RunError, match="holds other files and no run"):
        train.train(e, tmp_path)
    with pytest.raises(RunError, match="does not exist"):
        train.train(e, tmp_path / "nothing", resume=True)
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 5: the tokenizer has 257"):
        train.train(e.override({"model.vocab_size": 5}), tmp_path / "run")
    with pytest.raises(DataError, match="fewer than one window"):
        train.train(e.override({"model.context_length": 100_000}), tmp_path / "run")


def test_a_run_can_start_from_the_weights_of_another(tmp_path):
    e = tiny_run(tmp_path)
    train.train(e, tmp_path / "first")
    first, _ = load_params(open_run(tmp_path / "first"), "last")
    still = {"optim.learning_rate": 1e-30, "optim.weight_decay": 0.0, "train.steps": 3, "init": str(tmp_path / "first")}
    train.train(e.override(still), tmp_path / "second")
    second, _ = load_params(open_run(tmp_path / "second"), "last")
    jax.tree.map(np.testing.assert_array_equal, first, second)
    with pytest.raises(RunError, match="was trained with another tokenizer"):
        train.train(e.override(still | {"data.tokenizer": "char"}), tmp_path / "third")
    with pytest.raises(RunError, match=r"blocks\.ffn\.up: \(2, 16, 64\) there, \(2, 16, 32\) here"):
        train.train(e.override(still | {"model.ffn_dim": 32}), tmp_path / "third")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    e = tiny_run(
        tmp_path, **{"optim.learning_rate": 1e30, "optim.clip_norm": None, "optim.warmup_steps": 0, "train.steps": 9}
    )
    with pytest.raises(TrainingFailed, match=r"loss (nan|inf)|gradient norm (nan|inf)"):
        train.train(e, tmp_path / "run")
    assert open_run(tmp_path / "run").result() is None


def test_flops_are_those_of_the_formula():
    m = tiny_run(Path("/tmp")).model
    m = dataclasses.replace(m, vocab_size=11)
    matrices = 2 * (4 * 16 * 16 + 2 * 16 * 64) + 16 * 11
    vectors = 2 * (16 * 4 + 64 + 16 + 4 * 16) + 2 * 16
    assert flops_per_token(m) == 6 * (matrices + vectors) + 12 * 2 * 16 * 16
    assert num_params(m)["total"] == matrices + vectors + 16 * 16


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["SIGINT", "SIGTERM"]
)
def test_a_real_signal_saves_and_the_same_command_finishes(tmp_path, number):
    e = tiny_run(tmp_path, **{"train.steps": 120, "train.checkpoint_every": 1000, "train.eval_every": 0})
    (tmp_path / "mine.py").write_text(
        f"from gptjax.config import Experiment\nexperiment = Experiment.from_json({e.to_json()!r})\n"
    )
    command = [sys.executable, "-m", "gptjax", "train", str(tmp_path / "mine.py"), "--run-dir", str(tmp_path / "run"),
               "--train.sample-tokens", "0"]  # fmt: skip
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "is saved; the same command goes on from there" in errors and "Traceback" not in errors
    stopped_at = checkpoint.choose(tmp_path / "run" / "checkpoints").step
    assert 0 < stopped_at < 120
    finished = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 120


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    e = tiny_run(tmp_path, **{"train.steps": 6, "model.dropout": 0.1})
    (tmp_path / "mine.py").write_text(
        f"from gptjax.config import Experiment\nexperiment = Experiment.from_json({e.to_json()!r})\n"
    )

    def start(folder, **cluster):
        command = [sys.executable, "-m", "gptjax", "train", str(tmp_path / "mine.py"), "--run-dir", str(folder)]
        environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"} | cluster
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    cluster = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    pair = [start(tmp_path / "two", **cluster, JAX_PROCESS_ID=str(i)) for i in range(2)]
    for process in [*pair, start(tmp_path / "one")]:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    one, two = (open_run(tmp_path / name).metrics() for name in ("one", "two"))
    assert [x["step"] for x in one] == [x["step"] for x in two]
    for name in ("loss", "val_loss", "grad_norm"):
        values = [[x[name] for x in lines if name in x] for lines in (one, two)]
        np.testing.assert_allclose(*values, atol=1e-5, err_msg=name)
    assert open_run(tmp_path / "two").provenance()["processes"] == 2
    # what two processes saved, one goes on with
    saved = load_params(open_run(tmp_path / "two"), "last")[0], load_params(open_run(tmp_path / "one"), "last")[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *saved)
