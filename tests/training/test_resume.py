"""A run in pieces is the unbroken run: every bit of the state and every example, at every step."""

import dataclasses
import hashlib
import json
import random
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import assert_same, fine_tuning, restored, tiny_run, use_one_device, write_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import PATIENCE, slowly, start, start_job, wait_for_step, write_experiment

from gptjax.config import Experiment
from gptjax.errors import Interrupted, RunError
from gptjax.training import checkpoint, loop, train
from gptjax.training.run import open_run

pytestmark = pytest.mark.usefixtures("single_device")


class Crash(Exception):
    """What a run dies of in these tests."""


class Recorder:
    """Notes the bits of state and batch after every step of `train`, and breaks a run off after chosen steps."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.seen: dict[int, str] = {}  # step -> hash of what was read and what came out, never twice another one
        self.stop: tuple[int, str] | None = None
        self._prepare, self._requested = train.build_train_setup, False
        patch.setattr(train, "build_train_setup", self.build_train_setup)
        patch.setattr(loop, "stop_requests", self.stop_requests)

    def build_train_setup(self, experiment, **how):
        setup = self._prepare(experiment, **how)

        def step(state, batch):
            number, samples = int(state.step), setup.batches.example_ids(int(state.step))
            state, metrics = setup.train_step(state, batch)
            content = [*map(np.asarray, jax.tree.leaves((state, batch))), samples]
            bits = hashlib.sha256(b"".join(x.tobytes() for x in content)).hexdigest()
            assert self.seen.setdefault(number + 1, bits) == bits, f"step {number + 1} differs from the unbroken run's"
            if self.stop == (number + 1, "crash"):
                raise Crash
            return state, metrics

        return dataclasses.replace(setup, train_step=step)

    def stop_requests(self):
        recorder = self

        class Requests:
            def __enter__(self):
                return lambda step: "SIGTERM" if recorder.stop == (step, "signal") else None

            def __exit__(self, *_):
                return None

        return Requests()

    def run(self, experiment: Experiment, folder: Path, stops: list[tuple[int, str]]) -> dict:
        """Trains to the end, broken off at each of `stops` in turn."""
        for self.stop in stops:
            with pytest.raises((Crash, Interrupted)):
                train.train(experiment, folder)
        self.stop = None
        return train.train(experiment, folder)


def check_in_pieces(changes: dict, stops: list[tuple[int, str]], init: Path | None = None) -> None:
    """Of pre-training; with `init` of fine-tuning from that run."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        sources = changes.pop("sources", 1)
        if sources > 1:
            (folder / "b").mkdir()
            changes |= {"data.source": (str(write_corpus(folder)), str(write_corpus(folder / "b", 3000)))}
        e = fine_tuning(folder, init, **changes) if init else tiny_run(folder, **changes)
        recorder = Recorder(patch)
        whole = recorder.run(e, folder / "whole", [])
        assert sorted(recorder.seen) == list(range(1, e.train.steps + 1))
        parts = recorder.run(e, folder / "parts", stops)
        last = {x: restored(folder / x) for x in ("whole", "parts")}
        assert_same(last["whole"], last["parts"])
        assert parts["val_loss"] == whole["val_loss"] and parts["best_val_loss"] == whole["best_val_loss"]
        losses = [
            [(x["step"], x["loss"]) for x in open_run(folder / x).metrics() if "loss" in x] for x in ("whole", "parts")
        ]
        assert losses[0] == losses[1], "metrics.jsonl has every step once, with the same loss"
        assert not (folder / "parts" / "lock.json").exists()


ANY: dict[str, st.SearchStrategy] = {
    "train.steps": st.integers(4, 9),
    "train.checkpoint_every": st.sampled_from([1, 2, 3]),
    "train.microbatches": st.sampled_from([1, 2]),
    "train.eval_every": st.sampled_from([0, 2]),
    "model.dropout": st.sampled_from([0.0, 0.2]),
    "optim.ema_decay": st.sampled_from([None, 0.9]),
    "train.spike_sigma": st.sampled_from([None, 6.0]),
}
RUNS = {
    "pre-training": {"data.tokenizer": st.sampled_from(["byte", "char"]), "sources": st.sampled_from([1, 2])},
    "fine-tuning": {
        "objective.name": st.sampled_from(["sft", "prefix_lm"]),
        "model.lora_rank": st.sampled_from([0, 1, 3]),
        "optim.freeze": st.sampled_from([(), ("embedding.*", "*.up*"), ("blocks.ffn.*",)]),
        "optim.layer_decay": st.sampled_from([1.0, 0.7]),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [(name, "pre-training") for name in ("adamw", "lion", "adafactor", "sgd", "muon", "schedule_free")]
    + [(name, "fine-tuning") for name in ("adamw", "adafactor", "muon")],  # each with a state of another shape
)
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_run_in_any_pieces_is_the_unbroken_run_bit_for_bit(finished_run, kind, optimizer, data):
    changes = data.draw(st.fixed_dictionaries(ANY | RUNS[kind])) | {"optim.name": optimizer}
    if optimizer == "schedule_free":
        changes |= {"optim.schedule": "constant"}
    steps = changes["train.steps"]
    kinds = st.tuples(st.integers(1, steps - 1), st.sampled_from(["signal", "crash"]))
    stops = sorted(data.draw(st.lists(kinds, min_size=1, max_size=3, unique_by=lambda stop: stop[0])))
    check_in_pieces(changes, stops, finished_run if kind == "fine-tuning" else None)


@pytest.mark.parametrize("kind", ["pre-training", pytest.param("fine-tuning", marks=pytest.mark.slow)])
def test_a_run_stopped_three_times_is_the_unbroken_run_bit_for_bit(finished_run, kind):
    """By a signal, by a crash with a save in flight, and by a signal again; dropout, accumulation and averages on."""
    changes = {"model.dropout": 0.1, "train.microbatches": 2, "optim.ema_decay": 0.9, "train.checkpoint_every": 2}
    stops = [(1, "signal"), (4, "crash"), (5, "signal")]
    check_in_pieces(changes, stops, finished_run if kind == "fine-tuning" else None)


@pytest.mark.slow
def test_a_run_stopped_exactly_at_an_epochs_end_is_the_unbroken_run_bit_for_bit(tmp_path):
    e = tiny_run(tmp_path)
    windows = train.build_train_setup(e).batches.train_streams[0].windows_per_epoch
    rows = next(n for n in range(8, windows + 1) if windows % n == 0)  # a batch that divides the epoch
    end = windows // rows
    changes = {"train.batch_size": rows, "train.steps": end + 2, "train.checkpoint_every": end, "train.eval_every": 0}
    check_in_pieces(changes | {"train.log_every": 1}, [(end, "signal"), (end + 1, "signal")])


@pytest.mark.slow
def test_the_speed_of_a_run_in_pieces_is_that_of_its_steps(tmp_path, monkeypatch):
    """By a clock on which a step takes 1.25 s, 0.25 of it for the batch, and the first of a process 100 s more.

    It resumes from steps 3 and 4, when the last logged seconds are those up to step 2.
    """
    now = 0.0

    def tick(seconds: float) -> None:
        nonlocal now
        now += seconds

    def slowly(make, steps, depth):
        for step in steps:
            batch = make(step)
            make.func.__self__.seconds = 0.25 * (step - steps[0])
            tick(0.25)
            yield batch

    recorder = Recorder(monkeypatch)

    def build_train_setup(experiment, **how):
        setup = recorder.build_train_setup(experiment, **how)
        compiling = [100.0]

        def step(state, batch):
            tick(1 + (compiling.pop() if compiling else 0))
            return setup.train_step(state, batch)

        return dataclasses.replace(setup, train_step=step)

    monkeypatch.setattr(train, "build_train_setup", build_train_setup)
    monkeypatch.setattr(loop, "prefetch", slowly)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now))
    changes = {"train.steps": 9, "train.log_every": 2, "train.checkpoint_every": 4, "train.eval_every": 0}
    e = tiny_run(tmp_path, **changes)
    for name, stops, timed in (("whole", [], 8), ("parts", [(3, "signal"), (5, "crash")], 1 + 4)):
        result = recorder.run(e, tmp_path / name, stops)
        assert result["seconds"] == pytest.approx(1.25 * timed)
        assert result["tokens_per_second"] == pytest.approx(8 * 16 / 1.25)
        assert result["mfu"] == pytest.approx(open_run(tmp_path / name).metrics()[-2]["mfu"])
        assert result["data_wait_share"] == result["data_work_share"] == pytest.approx(0.2)


def test_a_finished_run_or_one_killed_before_its_result_is_only_reported(tmp_path, capfd):
    e = tiny_run(tmp_path)
    result = train.train(e, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"val_loss"', '"other"'))  # as if the last lines had been lost
    assert train.train(e, tmp_path / "run")["val_loss"] == result["val_loss"]
    capfd.readouterr()
    train.train(e, tmp_path / "run")
    assert "is already finished; nothing to do" in capfd.readouterr().err


@pytest.mark.slow
def test_changes_are_refused_and_with_permission_no_example_is_lost_or_read_twice(tmp_path):
    e = tiny_run(tmp_path, **{"train.steps": 4, "train.checkpoint_every": 2, "train.eval_every": 0})
    train.train(e, tmp_path / "run")
    more = e.override({"train.steps": 8, "train.batch_size": 12, "train.checkpoint_every": 100})
    with pytest.raises(RunError, match=r"(?s)--allow-changes.*train\.batch_size: 8 in the run, 12 now"):
        train.train(more, tmp_path / "run")

    read: list[int] = []
    prepared = train.build_train_setup

    def recording(experiment, **how):
        setup = prepared(experiment, **how)
        samples = setup.batches.example_ids

        def train_step(state, batch):
            numbers = samples(int(state.step)).ravel()
            read.extend(numbers.tolist())
            np.testing.assert_array_equal(
                np.asarray(batch.tokens).reshape(-1, 16), setup.batches.make_examples(numbers).tokens
            )
            return setup.train_step(state, batch)

        return dataclasses.replace(setup, train_step=train_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_train_setup", recording)
        result = train.train(more, tmp_path / "run", allow_changes=True)
    assert read == list(range(4 * 8, 4 * 8 + 4 * 12))
    assert result["samples"] == 4 * 8 + 4 * 12 and result["tokens"] == 16 * result["samples"]
    run = open_run(tmp_path / "run")
    assert run.experiment.train.batch_size == 12
    (change,) = run.provenance()["changes"]
    assert change["step"] == 4 and change["samples"] == 32 and change["fields"]["train.batch_size"] == [8, 12]
    assert json.loads((tmp_path / "run" / "result-before-step-4-again-1.json").read_text())["steps"] == 4
    # resumed once more, it still knows how many it has read
    again = more.override({"train.steps": 9})
    assert train.train(again, tmp_path / "run", allow_changes=True)["samples"] == 4 * 8 + 5 * 12

    # other text: a new order of examples from its first, and counted all the same
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(corpus.read_text()[:-1] + "!")
    with pytest.raises(RunError, match="data \\(SHA-256 of text, tokenizer and split\\)"):
        train.train(again, tmp_path / "run")
    last = again.override({"train.steps": 10})
    read.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_train_setup", recording)
        assert train.train(last, tmp_path / "run", allow_changes=True)["samples"] == 4 * 8 + 6 * 12
    assert read == list(range(12))


def test_another_environment_at_a_resume_is_said_and_recorded(tmp_path, single_device, monkeypatch, capfd):
    e = tiny_run(tmp_path, **{"train.steps": 2, "optim.warmup_steps": 1})
    train.train(e, tmp_path / "run")
    train.train(e.override({"train.steps": 3}), tmp_path / "run", allow_changes=True)
    assert "another environment" not in capfd.readouterr().err
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    for steps in (4, 5):  # it is said when it changes, and not again
        train.train(e.override({"train.steps": steps}), tmp_path / "run", allow_changes=True)
    err = capfd.readouterr().err
    assert err.count("resumes in another environment, so bits may differ") == 1
    assert "-> '--xla_cpu_enable_fast_math=true'" in err
    (entry,) = open_run(tmp_path / "run").provenance()["environments"]
    assert entry["settings"]["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=true" and "when" in entry


@pytest.mark.parametrize("change", [{"model.num_heads": 4}, {"model.ffn": "relu"}, {"model.positions": "alibi"}])
def test_the_same_shapes_with_another_meaning_are_refused(finished_run, change):
    (field,) = change
    e = open_run(finished_run).experiment
    other = {"model.head_dim": 16 // 4, "model.num_kv_heads": 4} if field == "model.num_heads" else {}
    with pytest.raises(RunError, match=f"{field}: .* in the run, .* now"):
        train.train(e.override(change | other), finished_run)


@pytest.fixture(scope="module")
def tuned_run(finished_run, tmp_path_factory) -> Path:
    """A run of two steps that began with another one."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        train.train(fine_tuning(folder, finished_run, **{"train.steps": 2, "optim.warmup_steps": 1}), folder / "run")
    return folder / "run"


@pytest.mark.parametrize(
    "change",
    [
        {"init": "another"},
        {"data.prompt": "{number}{letter}:"},
        {"data.answer": "{next}{next}"},
        {"data.labels": tuple("bcdefghijklmnopqrstuvwxyz")},
        {"objective.name": "prefix_lm"},
        {"model.lora_rank": 3},
        {"model.lora_alpha": 3.0},
        {"model.lora_targets": ("query", "out", "up", "down")},
        {"optim.freeze": ()},
        {"optim.layer_decay": 0.9},
    ],
)
def test_fine_tuning_in_another_way_is_refused_with_the_difference(tuned_run, change):
    (field,) = change
    e, before = open_run(tuned_run).experiment, (tuned_run / "experiment.json").read_text()
    with pytest.raises(RunError, match=rf"(?s)holds another experiment.*{field}: .* in the run, .* now"):
        train.train(e.override(change), tuned_run)
    if field == "model.lora_rank":
        with pytest.raises(RunError, match=r"lora_down: float32\[2, 16, 2\] saved, .*decided by model\.lora_rank"):
            train.train(e.override(change | {"train.steps": 3}), tuned_run, allow_changes=True)
    assert (tuned_run / "experiment.json").read_text() == before


def test_a_table_that_was_changed_by_one_letter_is_refused(finished_run, tmp_path):
    e = fine_tuning(tmp_path, finished_run, **{"train.steps": 2, "optim.warmup_steps": 1})
    train.train(e, tmp_path / "run")
    table = tmp_path / "table.jsonl"
    table.write_text(table.read_text().replace('"a"', '"A"', 1))
    with pytest.raises(RunError, match=r"data \(SHA-256 of text, tokenizer and split\): .* in the run, .* now"):
        train.train(e.override({"train.steps": 3}), tmp_path / "run")


def test_another_tokenizer_is_refused_even_with_permission(tmp_path):
    e = tiny_run(tmp_path)
    train.train(e, tmp_path / "run")
    with pytest.raises(RunError, match="was trained with another tokenizer"):
        train.train(e.override({"data.tokenizer": "char"}), tmp_path / "run", allow_changes=True)


def unbroken(mine: Path, folder: Path) -> dict:
    process = start(mine, folder)
    assert process.wait(PATIENCE) == 0, process.communicate()[1]
    return restored(folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_real_signal_saves_and_the_same_command_finishes_bit_for_bit(tmp_path, number):
    e = tiny_run(tmp_path, **{"train.steps": 60, "train.checkpoint_every": 1000, "train.eval_every": 0})
    mine = write_experiment(tmp_path, e.override({"train.sample_tokens": 0}))
    whole = unbroken(mine, tmp_path / "whole")
    process = start(mine, tmp_path / "run", command=slowly(mine, tmp_path / "run"))
    wait_for_step(tmp_path / "run", 5, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, errors
    assert "is saved; the same command resumes from there" in errors and "Traceback" not in errors
    assert 0 < checkpoint.choose(tmp_path / "run" / "checkpoints").step < 60
    assert_same(unbroken(mine, tmp_path / "run"), whole)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once_and_corrupts_nothing(tmp_path):
    e = tiny_run(tmp_path, **{"train.steps": 3000, "train.checkpoint_every": 5, "train.eval_every": 0})
    mine = write_experiment(tmp_path, e)
    draw = random.Random(0)
    codes = []
    for _ in range(4):
        process = start(mine, tmp_path / "run")
        before = max((c.step for c in checkpoint.listing(tmp_path / "run" / "checkpoints")), default=0)
        wait_for_step(tmp_path / "run", before + 20, process)
        process.send_signal(signal.SIGINT)
        assert any("stopping after this step" in line for line in process.stderr), "the first one is heard"
        wait = draw.uniform(0, 0.02)
        try:
            process.wait(wait)
        except Exception:
            process.send_signal(signal.SIGINT)
        codes.append(process.wait(PATIENCE))
        found = checkpoint.listing(tmp_path / "run" / "checkpoints")
        assert found and all(checkpoint.problem(c) is None for c in found)
        assert found[-1].step >= before + 10
    assert set(codes) <= {75, 130} and 130 in codes


MOVE = """
import sys
from pathlib import Path
import jax
from gptjax import sharding
sharding.join_cluster()
from gptjax.training import checkpoint
from gptjax.training.run import open_run
from gptjax.training.restore import restore_state
from gptjax.training.train_setup import build_train_setup
assert jax.process_count() == 2
run = open_run(Path(sys.argv[1]))
setup = build_train_setup(run.experiment)
found = checkpoint.choose(run.checkpoints)
with jax.set_mesh(setup.mesh):
    writer = checkpoint.CheckpointWriter(Path(sys.argv[2]), 1, 0)
    writer.save(restore_state(found, setup.abstract, setup.experiment), found.position)
    writer.close()
"""


@pytest.mark.slow
def test_two_processes_train_as_one_stop_as_one_and_hand_over_to_one_and_back(tmp_path):
    """SIGTERM to one of two saves the same step on both; one process resumes from there, then two again."""
    e = tiny_run(tmp_path, **{"train.steps": 60, "model.dropout": 0.1, "train.eval_every": 0, "train.keep_last": 9})
    e = e.override({"train.checkpoint_every": 1000, "train.sample_tokens": 0, "model.bias": False})
    mine = write_experiment(tmp_path, e.override({"optim.learning_rate": 1e-3}))
    unbroken(mine, tmp_path / "one")
    run = tmp_path / "run"
    stopped = [0]
    for count in (2, 1, 2):
        command = slowly(mine, run)
        job = start_job(count, mine, run, command=command) if count > 1 else [start(mine, run, command=command)]
        wait_for_step(run, stopped[-1] + 3, job[0])
        job[-1].send_signal(signal.SIGTERM)
        for process in job:
            _, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode == 75, errors
            step = checkpoint.choose(run / "checkpoints").step
            assert f"step {step} is saved" in errors
        assert step > stopped[-1]
        stopped.append(step)
    assert open_run(run).provenance()["processes"] == 2
    # the arrays that one process reads are those that two read and wrote again
    script = tmp_path / "move.py"
    script.write_text(MOVE)
    command = [sys.executable, str(script), str(run), str(tmp_path / "moved")]
    for process in start_job(2, mine, run, command=command):
        assert process.wait(PATIENCE) == 0, process.communicate()[1]
    moved = restored(run), restored(run, folder_of_checkpoints=tmp_path / "moved")
    assert_same(*moved)
    for process in start_job(2, mine, run):
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    losses = [{x["step"]: x["loss"] for x in open_run(p).metrics() if "loss" in x} for p in (run, tmp_path / "one")]
    assert losses[0].keys() == losses[1].keys()
    for step, loss in losses[0].items():
        assert loss == pytest.approx(losses[1][step], abs=1e-5), step
