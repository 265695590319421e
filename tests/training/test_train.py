"""A whole run: what it leaves, that it can be stopped anywhere and resumes bit for bit, and what it refuses."""

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import tiny_run

from gptjax.errors import ConfigError, DataError, RunError
from gptjax.model.size import flops_per_token, num_params
from gptjax.training import checkpoint, hardware, train
from gptjax.training.evaluation import evaluate_run
from gptjax.training.hardware import peak_flops
from gptjax.training.restore import load_params
from gptjax.training.run import open_run

ROOT = Path(__file__).parent.parent.parent


pytestmark = pytest.mark.usefixtures("single_device")


def test_a_run_leaves_everything_that_is_promised(tmp_path):
    e = tiny_run(tmp_path, **{"train.trackers": ("tensorboard",)})
    result = train.train(e, tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.result() == {"format": 1} | result
    wanted = {"val_loss", "val_bits_per_byte", "steps", "tokens", "seconds", "tokens_per_second", "num_params"}
    assert wanted <= result.keys()
    assert result["steps"] == 6 and result["tokens"] == 6 * 8 * 16
    assert result["num_params"] == num_params(run.experiment.model)["total"]
    assert run.experiment == e.resolved(257)
    lines = run.metrics()
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4, 5, 6]
    assert [x["step"] for x in lines if "val_loss" in x] == [3, 6]
    assert lines[-1]["val_loss"] == result["val_loss"]
    assert {"data", "versions", "devices", "command"} <= run.provenance().keys()
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    # byte tokens: a nat a token is 1 / ln 2 bits a byte, but for the end of text, which has no byte
    assert result["val_bytes"] == result["val_tokens"] - 1
    bits = result["val_loss"] * result["val_tokens"] / np.log(2) / result["val_bytes"]
    assert result["val_bits_per_byte"] == pytest.approx(bits)

    (run.folder / "result.json").unlink()  # as if killed after the last checkpoint: only the metrics are missing
    assert train.train(e, tmp_path / "run")["val_loss"] == result["val_loss"]

    before = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")}
    assert train.train(e, tmp_path / "run") == run.result(), "a finished run is left alone"
    assert before == {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")}
    # the final metrics of a run are those of an evaluation of its last checkpoint
    (tmp_path / "corpus.txt").unlink()  # its tokens are in the cache
    again = evaluate_run(run)
    assert again["val_loss"] == pytest.approx(result["val_loss"], rel=1e-6)


@pytest.mark.slow
def test_nothing_is_recompiled_in_a_run_with_evaluation(tmp_path, monkeypatch):
    shops = []
    prepared = train.build_train_setup
    monkeypatch.setattr(train, "build_train_setup", lambda e, **how: shops.append(prepared(e, **how)) or shops[-1])
    train.train(tiny_run(tmp_path, **{"train.microbatches": 2}), tmp_path / "run")
    assert shops[0].train_step._cache_size() == 1
    assert shops[0].eval_step._cache_size() == 1


@pytest.mark.slow
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
    with pytest.raises(RunError, match="has no checkpoint '3'; choose last, best or one of the steps"):
        checkpoint.choose(run.checkpoints, "3")


def test_another_experiment_in_the_folder_is_refused_with_the_difference(tmp_path):
    e = tiny_run(tmp_path)
    train.train(e, tmp_path / "run")
    with pytest.raises(RunError) as caught:
        train.train(e.override({"optim.learning_rate": 0.5, "seed": 3}), tmp_path / "run")
    assert "optim.learning_rate: 0.01 in the run, 0.5 now" in str(caught.value)
    assert "seed: 0 in the run, 3 now" in str(caught.value)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(corpus.read_text()[:-1] + "!")
    with pytest.raises(RunError, match=r"data \(SHA-256 of text, tokenizer and split\): .* in the run, .* now"):
        train.train(e, tmp_path / "run")


def test_folders_that_cannot_hold_a_run_are_refused(tmp_path):
    e = tiny_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        train.train(e, tmp_path / "file")
    with pytest.raises(RunError, match="holds other files but no run"):
        train.train(e, tmp_path)
    with pytest.raises(RunError, match="does not exist"):
        train.train(e, tmp_path / "nothing", resume=True)
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 5: the tokenizer has 257"):
        train.train(e.override({"model.vocab_size": 5}), tmp_path / "run")
    with pytest.raises(DataError, match="fewer than one window"):
        train.train(e.override({"model.context_length": 100_000}), tmp_path / "run")


@pytest.mark.slow
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
    with pytest.raises(ConfigError, match=r"model\.ffn_dim = 32: the model of init = .* has 64; leave it out"):
        train.train(e.override(still | {"model.ffn_dim": 32}), tmp_path / "third")


def test_flops_are_those_of_the_formula():
    m = tiny_run(Path("/tmp")).model
    m = dataclasses.replace(m, vocab_size=11)
    matrices = 2 * (4 * 16 * 16 + 2 * 16 * 64) + 16 * 11
    vectors = 2 * (16 * 4 + 64 + 16 + 4 * 16) + 2 * 16
    assert flops_per_token(m) == 6 * (matrices + vectors) + 12 * 2 * 16 * 16
    assert num_params(m)["total"] == matrices + vectors + 16 * 16


def four_devices(monkeypatch, kind: str, platform: str) -> None:
    """Only what JAX says of them; what is computed is computed here."""
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind, platform=platform)] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("TPU v6 lite", 918),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
    ],
)
def test_the_peak_is_that_of_the_very_device_times_their_number(monkeypatch, kind, teraflops):
    four_devices(monkeypatch, kind, "gpu")
    assert peak_flops()[0] == 4 * teraflops * 1e12


@pytest.mark.parametrize("platform, counted", [("gpu", 4), ("cpu", 1)])
def test_a_device_without_a_data_sheet_is_measured_and_all_but_cores_are_counted(monkeypatch, platform, counted):
    four_devices(monkeypatch, "Wonder 1", platform)
    a_product_a_second = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(hardware, "time", a_product_a_second)
    found, source = peak_flops()
    assert found == counted * 2 * 1024**3 and source.startswith("measured")
