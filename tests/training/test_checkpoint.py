"""Checkpoints: an intact one loads bit for bit on any mesh; damage is noticed, named and skipped."""

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same, restored, tiny_run
from processes import PATIENCE, QUICK, ROOT, start, write_experiment

from gptjax import sharding
from gptjax.atomic_io import format_bytes
from gptjax.config import Experiment
from gptjax.data.batches import DataPosition
from gptjax.errors import RunError, TrainingFailed
from gptjax.sharding import one_device
from gptjax.training import checkpoint, train
from gptjax.training.restore import load_params, restore_state
from gptjax.training.run import open_run
from gptjax.training.train_setup import build_train_setup, create_state

pytestmark = pytest.mark.usefixtures("single_device")
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy of a finished run with checkpoints 2, 4 and 6."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def resume(run: Path, **options):
    """Trains on with the run's own experiment; without its result, so that it looks for its checkpoint."""
    (run / "result.json").unlink(missing_ok=True)
    return train.train(open_run(run).experiment, run, **options)


def steps(run: Path) -> list[int]:
    return [c.step for c in checkpoint.listing(run / "checkpoints")]


def largest_file(run: Path, step: int) -> Path:
    arrays = run / "checkpoints" / f"{step:08d}" / "arrays"
    return max((p for p in arrays.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_every_single_flipped_bit_is_noticed(run):
    """200 flips over all files of a checkpoint, each bit as likely as the others; and one in every file at least."""
    folder = run / "checkpoints" / "00000006"
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    assert {p.name for p in files} >= {"manifest.json", "committed", "_METADATA"}
    draw = random.Random(0)
    bits = [p.stat().st_size * 8 for p in files]
    chosen = [*files, *draw.choices(files, bits, k=200 - len(files))]
    noticed = 0
    for path in chosen:
        bit = draw.randrange(path.stat().st_size * 8)
        flip(path, bit)
        (last,) = [c for c in checkpoint.listing(run / "checkpoints") if c.step == 6]
        why = checkpoint.problem(last)
        noticed += why is not None
        assert why and folder.name in why, (path, bit)
        flip(path, bit)
    print(f"{noticed} of {len(chosen)} flipped bits noticed")
    assert noticed == 200 and checkpoint.problem(checkpoint.choose(run / "checkpoints")) is None


@pytest.mark.parametrize(
    "harm",
    ["flip", *(pytest.param(harm, marks=pytest.mark.slow) for harm in ("truncate", "delete", "manifest", "unlisted"))],
)
def test_a_damaged_last_checkpoint_is_quarantined_and_the_run_resumes_from_the_one_before(run, harm, capfd):
    unbroken = restored(run)
    path = largest_file(run, 6)
    if harm == "flip":
        flip(path, 1000)
    elif harm == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif harm == "delete":
        path.unlink()
    elif harm == "manifest":
        path = run / "checkpoints" / "00000006" / "manifest.json"
        path.unlink()
    else:
        path = path.with_name("stray")
        path.write_text("")
    assert checkpoint.choose(run / "checkpoints").step == 4, "a reader skips it too, and leaves it where it is"
    assert steps(run) == [2, 4, 6]
    with pytest.raises(RunError, match=f"step 6 cannot be used: .*{path.name}"):
        checkpoint.choose(run / "checkpoints", "6")
    capfd.readouterr()
    resume(run)
    errors = capfd.readouterr().err
    assert "warning: step 6 cannot be used" in errors and path.name in errors
    assert "falling back to step 4" in errors and "set-aside" in errors
    assert (run / "checkpoints" / "set-aside" / "00000006-damaged").is_dir()
    assert_same(restored(run), unbroken)


def test_a_run_without_an_intact_checkpoint_stops_and_never_starts_again_from_nothing(run):
    for step in (2, 4, 6):
        largest_file(run, step).unlink()
    for _ in range(2):
        with pytest.raises(RunError, match="no intact checkpoint is left"):
            resume(run)
    assert len(list((run / "checkpoints" / "set-aside").iterdir())) == 3
    with pytest.raises(RunError, match="no checkpoint yet"):
        load_params(open_run(run), "last")


def test_other_folders_are_not_taken_for_checkpoints(run, capfd):
    folder = run / "checkpoints"
    (folder / "00000006" / "committed").unlink()
    (folder / "00000009").mkdir()  # Orbax would take it for the latest
    (folder / "00000010" / "arrays.orbax-checkpoint-tmp").mkdir(parents=True)
    shutil.copytree(folder / "00000002", folder / "00000001.deleting")
    (folder / "notes.txt").write_text("mine")
    assert steps(run) == [2, 4]
    resume(run)
    errors = capfd.readouterr().err
    for name in ("00000006", "00000009", "00000010", "notes.txt"):
        assert name in errors
    assert steps(run) == [2, 4, 6]
    assert sorted(p.name for p in folder.iterdir()) == ["00000002", "00000004", "00000006", "notes.txt", "set-aside"]
    assert [p.name for p in (folder / "set-aside").iterdir()] == ["00000006-uncommitted"], "what has data is kept"


@pytest.mark.slow
def test_a_rollback_quarantines_later_checkpoints(run, capfd):
    before, unbroken = (run / "metrics.jsonl").read_text(), restored(run)
    resume(run, rollback_to=2)
    errors = capfd.readouterr().err
    assert "step 6: the run is rolled back to step 2" in errors and "step 4: the run is rolled back to step 2" in errors
    aside = run / "checkpoints" / "set-aside"
    assert sorted(p.name for p in aside.iterdir()) == ["00000004-rolled-back-to-2", "00000006-rolled-back-to-2"]
    assert (run / "metrics-before-step-2-again-1.jsonl").read_text() == before
    assert steps(run) == [2, 4, 6]
    assert_same(restored(run), unbroken)
    with pytest.raises(RunError, match=r"has no checkpoint of step 3 to roll back to; there are 2, 4, 6"):
        resume(run, rollback_to=3)


def test_a_refused_command_moves_nothing(run):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    e = open_run(run).experiment
    for changes, options in [
        ({"model.ffn_dim": 32}, {"rollback_to": 2, "allow_changes": True}),
        ({"train.steps": 4, "optim.warmup_steps": 1}, {"allow_changes": True}),
        ({"seed": 1}, {"rollback_to": 2}),
        ({}, {"rollback_to": 3}),
    ]:
        with pytest.raises(RunError):
            train.train(e.override(changes), run, **options)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, (changes, options)


@pytest.mark.slow
def test_a_run_killed_amid_its_first_save_starts_again_and_one_that_lost_its_folder_is_refused(run, capfd):
    unbroken = restored(run)
    folder = run / "checkpoints"
    for step in (4, 6):
        shutil.rmtree(folder / f"{step:08d}")
    (folder / "00000002" / "committed").unlink()  # the moment before it was written
    metrics = run / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.open() if json.loads(line)["step"] <= 3))
    resume(run)
    assert "00000002: was never committed" in capfd.readouterr().err
    assert_same(restored(run), unbroken)

    shutil.rmtree(folder)
    before = metrics.read_text()
    with pytest.raises(RunError, match=r"holds no checkpoint, but the run has logged step 6;.*--rollback-to 0"):
        resume(run)
    assert metrics.read_text() == before
    resume(run, rollback_to=0)
    assert_same(restored(run), unbroken)
    assert (run / "metrics-before-step-0-again-1.jsonl").read_text() == before


def test_a_disk_that_cannot_read_or_remove_does_not_end_a_run(run, monkeypatch, capfd):
    """Both errors are raised by hand: a broken disk cannot be had."""
    unbroken, digest = restored(run), checkpoint.digest

    def broken(path):
        if "00000006" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return digest(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "digest", broken)
        assert checkpoint.choose(run / "checkpoints").step == 4
        assert "cannot be read (Input/output error)" in capfd.readouterr().err
    shutil.rmtree(run / "checkpoints" / "00000006")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(OSError(errno.ENOTEMPTY, "Not empty")))
        (run / "result.json").unlink()
        train.train(open_run(run).experiment.override({"train.keep_last": 1}), run, allow_changes=True)
    assert "could not be removed (Not empty)" in capfd.readouterr().err
    assert steps(run)[-1] == 6
    assert_same(restored(run), unbroken)


def test_other_shapes_and_dtypes_are_refused_by_name(run):
    open_run(run)
    chosen, e = checkpoint.choose(run / "checkpoints"), open_run(run).experiment

    def refusal(experiment: Experiment, chosen=chosen) -> str:
        setup = build_train_setup(experiment, one_device())
        with pytest.raises(RunError) as caught:
            restore_state(chosen, setup.abstract, setup.experiment)
        return str(caught.value)

    wide = refusal(e.override({"model.ffn_dim": 32}))
    assert "params.blocks.ffn.up: float32[2, 16, 64] saved, float32[2, 16, 32] now; decided by model.ffn_dim" in wide
    assert "decided by model.num_layers" in refusal(e.override({"model.num_layers": 3}))
    assert "decided by model.context_length" in refusal(e.override({"model.context_length": 8}))
    assert "opt_state" in refusal(e.override({"optim.name": "sgd"})) and "the fields of optim" in refusal(
        e.override({"optim.name": "lion"})
    )
    # Orbax would round float32 weights to bfloat16, or the other way, without a word
    setup = build_train_setup(e, one_device())
    state = restore_state(chosen, setup.abstract, setup.experiment)
    half = state._replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params))
    writer = checkpoint.CheckpointWriter(run / "half", 1, 0)
    writer.save(half, DataPosition(step=6))
    writer.close()
    message = refusal(e, checkpoint.choose(run / "half"))
    assert "params.blocks.attention.key: bfloat16[2, 16, 2, 8] saved, float32[2, 16, 2, 8] now" in message


def test_numbers_that_are_not_finite_are_never_saved(run, tmp_path):
    e = open_run(run).experiment
    setup = build_train_setup(e, one_device())
    state = restore_state(checkpoint.choose(run / "checkpoints"), setup.abstract, e)
    writer = checkpoint.CheckpointWriter(tmp_path / "checkpoints", 2, 1)
    writer.save(state, DataPosition(step=6), 1.0)
    up = state.params["blocks"]["ffn"]["up"].at[1, 2, 3].set(jnp.nan)
    params = state.params | {"blocks": state.params["blocks"] | {"ffn": state.params["blocks"]["ffn"] | {"up": up}}}
    later = state._replace(step=state.step + 1, params=params)
    with pytest.raises(TrainingFailed, match=r"step 7: params\.blocks\.ffn\.up .* not finite; the step is not saved"):
        writer.save(later, DataPosition(step=7), 0.5)
    with pytest.raises(TrainingFailed, match="already holds step 6; the earlier step 5 is not saved"):
        writer.save(state._replace(step=state.step - 1), DataPosition(step=5))
    writer.close()
    for which in ("last", "best"):
        assert checkpoint.choose(tmp_path / "checkpoints", which).step == 6


def test_a_checkpoint_of_release_0_1_loads_and_trains_on(tmp_path, monkeypatch):
    """Written by 0.1.0, format 1: a manifest without marker and position, a state without health."""
    shutil.copytree(GOLDEN / "0.1", tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("GOLDEN", str(tmp_path))
    state = restored(tmp_path / "run", "4")
    expected = json.loads((tmp_path / "expected.json").read_text())
    assert {name: hashlib.sha256(x.tobytes()).hexdigest() for name, x in state.items() if name in expected} == expected
    assert state.keys() - expected.keys() == {"health.skipped", "health.in_row", "health.losses"}
    lines, setup = open_run(tmp_path / "run").metrics(), build_train_setup(open_run(tmp_path / "run").experiment)
    chosen, by_hand = checkpoint.choose(tmp_path / "run" / "checkpoints", "4"), []
    with jax.set_mesh(setup.mesh):
        made = restore_state(chosen, setup.abstract, setup.experiment)
        for step in range(4, 8):
            made, metrics = setup.train_step(made, setup.batches.device_batch(step, setup.mesh))
            by_hand.append(float(metrics["loss"]))
    result = train.train(open_run(tmp_path / "run").experiment, tmp_path / "run")
    assert result["steps"] == 8 and result["samples"] == 64
    again = {x["step"]: x["loss"] for x in open_run(tmp_path / "run").metrics() if "loss" in x}
    before = {x["step"]: x["loss"] for x in lines if "loss" in x}
    assert list(before) == list(range(1, 9)) and [again[step] for step in range(1, 5)] == [*before.values()][:4]
    # its own later losses are no reference any more: release 0.1 drew other dropout masks
    np.testing.assert_allclose([again[step] for step in range(5, 9)], by_hand, rtol=1e-6)
    assert not [x for x in open_run(tmp_path / "run").metrics() if "event" in x], (
        "no loss counts as a jump from nothing"
    )
    note = tmp_path / "run" / "checkpoints" / "00000004" / "checkpoint.json"
    note.write_text(json.dumps({"format": 7, "all": "different"}))
    with pytest.raises(RunError, match="format 7, and this gptjax reads 1 and 2; use the release that wrote it"):
        load_params(open_run(tmp_path / "run"), "4")


@pytest.mark.slow
@pytest.mark.parametrize("names", [["1", "4x2"], pytest.param(["1", "8x1", "4x2", "2x4"], marks=pytest.mark.slow)])
def test_a_state_moves_between_meshes_bit_for_bit(tmp_path, names):
    """1, 8x1, 4x2 and 2x4 devices: the same arrays, the same batches, and losses within 1e-5 afterwards."""
    devices = jax.devices()
    meshes = {"1": (devices[:1], 1, 1), "8x1": (devices, 8, 1), "4x2": (devices, 4, 2), "2x4": (devices, 2, 4)}
    e = tiny_run(tmp_path, **{"model.num_heads": 4, "model.dropout": 0.1, "optim.ema_decay": 0.9})
    losses, arrays, previous = {}, {}, ""
    for number, name in enumerate(names):
        setup = build_train_setup(e, sharding.mesh_of(*meshes[name]))
        with jax.set_mesh(setup.mesh):
            if number == 0:
                state = create_state(setup.experiment, setup.tx, setup.abstract)
                state, _ = setup.train_step(state, setup.batches.device_batch(0, setup.mesh))
            else:
                state = restore_state(checkpoint.choose(tmp_path / previous), setup.abstract, setup.experiment)
            arrays[name] = jax.tree.map(np.array, state)
            writer = checkpoint.CheckpointWriter(tmp_path / name, 1, 0)
            writer.save(state, setup.batches.position(1))
            writer.close()
            losses[name] = []
            for step in (1, 2):
                batch = setup.batches.device_batch(step, setup.mesh)
                np.testing.assert_array_equal(np.asarray(batch.tokens), setup.batches.host_batch(step).tokens)
                state, metrics = setup.train_step(state, batch)
                losses[name].append(float(metrics["loss"]))
        previous = name
        jax.tree.map(np.testing.assert_array_equal, arrays["1"], arrays[name])
        np.testing.assert_allclose(losses[name], losses["1"], atol=1e-5)


LEAVES = """
import resource, signal, sys
from pathlib import Path
import conftest, jax
from gptjax.data.batches import DataPosition
from gptjax.sharding import one_device
from gptjax.training import checkpoint
from gptjax.training.run import open_run
from gptjax.training.restore import restore_state
from gptjax.training.train_setup import build_train_setup
source, target, how = sys.argv[1:]
e = open_run(Path(source)).experiment
setup = build_train_setup(e, one_device())
state = restore_state(checkpoint.choose(Path(source) / "checkpoints"), setup.abstract, e)
writer = checkpoint.CheckpointWriter(Path(target), 1, 0)
if how == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
writer.save(state, DataPosition(step=6))
if how == "raise":
    raise SystemError("something else went wrong")
"""


@pytest.mark.parametrize("how", ["leave", *(pytest.param(how, marks=pytest.mark.slow) for how in ("full", "raise"))])
def test_a_process_that_leaves_right_after_a_save_finishes_it_or_says_that_it_could_not(run, tmp_path, how):
    script = tmp_path / "leave.py"
    script.write_text(LEAVES)
    environment = os.environ | QUICK | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, str(script), str(run), str(tmp_path / "saved"), how]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    saved = [c for c in checkpoint.listing(tmp_path / "saved") if checkpoint.problem(c) is None]
    assert how != "raise" or "SystemError: something else went wrong" in ended.stderr, "the traceback survives"
    if how == "full" or (sys.version_info >= (3, 12) and ended.returncode == 3):
        # from Python 3.12 on no thread can be started at the end any more, and Orbax needs some: then it says so
        assert ended.returncode == 3 and "could not be saved" in ended.stderr, ended.stderr
        assert not saved
    else:
        assert ended.returncode == (1 if how == "raise" else 0), ended.stderr
        assert [c.step for c in saved] == [6]


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv[1:] = sys.argv[2:]
from gptjax.cli import main
main()
"""


def limited(size: int, *arguments, cwd: Path) -> subprocess.CompletedProcess:
    """The gptjax command where no file may grow beyond `size` bytes, as on a full disk."""
    command = [sys.executable, "-c", LIMITED, str(size), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | QUICK, cwd=cwd)


@pytest.mark.slow
def test_a_disk_that_is_full_when_a_line_is_logged_is_reported_and_harms_nothing(tmp_path):
    e = tiny_run(tmp_path, **{"train.steps": 200, "train.checkpoint_every": 5, "train.eval_every": 0})
    mine = write_experiment(tmp_path, e.override({"train.sample_tokens": 0}))
    assert start(mine, tmp_path / "other").wait(PATIENCE) == 0  # everything it needs is in the caches from here on
    size = (tmp_path / "other" / "metrics.jsonl").stat().st_size
    ended = limited(
        max(size - 100, 60_000) if size > 60_100 else size - 100, "train", mine, "--run-dir", tmp_path / "run", cwd=ROOT
    )
    assert "cannot be written (File too large)" in ended.stderr or "could not be saved" in ended.stderr
    assert ended.returncode == 3 and "Traceback" not in ended.stderr, ended.stderr
    found = checkpoint.listing(tmp_path / "run" / "checkpoints")
    assert all(checkpoint.problem(c) is None for c in found)
    assert start(mine, tmp_path / "run").wait(PATIENCE) == 0
    assert_same(restored(tmp_path / "run"), restored(tmp_path / "other"))


@pytest.mark.slow
def test_a_disk_that_is_full_in_mid_save_is_reported_and_harms_nothing_saved_before(tmp_path):
    e = tiny_run(tmp_path, **{"model.ffn_dim": 2048, "train.steps": 4, "train.checkpoint_every": 2})
    e = e.override({"train.eval_every": 0})
    mine = write_experiment(tmp_path, e)
    assert start(mine, tmp_path / "run").wait(PATIENCE) == 0  # everything it needs is in the caches from here on
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000004")
    before = restored(tmp_path / "run")
    ended = limited(100_000, "train", mine, "--run-dir", tmp_path / "run", cwd=ROOT)
    assert ended.returncode == 3, ended.stderr
    assert "step 4 could not be saved" in ended.stderr and "Traceback" not in ended.stderr
    assert steps(tmp_path / "run") == [2]
    assert_same(restored(tmp_path / "run"), before)
    assert start(mine, tmp_path / "run").wait(PATIENCE) == 0
    assert steps(tmp_path / "run") == [2, 4]


def test_a_disk_without_any_room_or_a_folder_that_cannot_be_written_is_refused_before_the_start(tmp_path):
    mine = write_experiment(tmp_path, tiny_run(tmp_path))
    ended = limited(0, "train", mine, "--run-dir", tmp_path / "run", cwd=ROOT)
    assert ended.returncode == 2 and "cannot be written (File too large)" in ended.stderr, ended.stderr
    process = start(mine, Path("/proc/nothing/can/be/made/here"))
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2 and "cannot be written" in errors and "Traceback" not in errors
    # two terabytes of weights and moments: no disk of a test machine has room for one checkpoint of that
    size = {"model.num_layers": 96, "model.embed_dim": 12288, "model.num_heads": 96}
    with pytest.raises(RunError, match=r"B free, and one checkpoint takes 2,?\d+\.\d+ GB"):
        train.train(tiny_run(tmp_path, **size), tmp_path / "large")
    assert not (tmp_path / "large").exists()
    assert [format_bytes(x) for x in (0, 512, 4096, 31e6, 2e12)] == ["0 bytes", "512 bytes", "4.1 kB", "31.0 MB",
                                                                     "2,000.00 GB"]  # fmt: skip
