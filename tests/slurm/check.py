"""Sweeps on the Slurm that `run` has started: finished, cancelled and resumed, killed and found again, out of time."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from gptjax.training.lock import holder

FILE = """
from gptjax.config import Experiment, ModelConfig, OptimConfig, TrainConfig, grid

base = Experiment(
    name="trial",
    model=ModelConfig(num_layers=1, embed_dim=16, num_heads=2, context_length=16),
    optim=OptimConfig(warmup_steps=2),
    train=TrainConfig(steps=30, batch_size=4, eval_every=0, checkpoint_every=10, sample_tokens=0),
)
sweep = grid(base, {"model.ffn": ["gelu", "relu"]})
"""
PATIENCE = 600  # seconds until the check counts as hanging
scratch = Path(sys.argv[1])
(scratch / "sweep.py").write_text(FILE)


def command(folder: str, *more: str) -> list[str]:
    return ["gptjax", "sweep", str(scratch / "sweep.py"), "--run-dir", str(scratch / folder), "--executor", "slurm",
            "--slurm.cpus", "1", *more]  # fmt: skip


def sweep(folder: str, *more: str) -> subprocess.CompletedProcess:
    done = subprocess.run(command(folder, *more), capture_output=True, text=True, timeout=PATIENCE)
    print(done.stdout + done.stderr, flush=True)
    return done


def states(folder: str, *more: str) -> dict[str, str]:
    lines = sweep(folder, "--status", *more).stdout.splitlines()
    return {line.split()[0]: line.split()[1] for line in lines if line.startswith("trial-")}


def notes(folder: str) -> dict[str, dict]:
    return {path.name.split(".")[0]: json.loads(path.read_text()) for path in (scratch / folder).glob("*.note.json")}


@contextlib.contextmanager
def running(folder: str, *more: str) -> Iterator[subprocess.Popen]:
    """A running sweep, which is killed at the end."""
    process = subprocess.Popen(command(folder, *more), stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(what, seconds: float = PATIENCE) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.3)


def all_trials_are_done() -> None:
    done = sweep("plain", "--seeds", "2")
    assert done.returncode == 0 and "4 trials (4 done)" in done.stderr, done
    assert set(states("plain", "--seeds", "2").values()) == {"done"}
    jobs = {note["job"].partition("_")[0] for note in notes("plain").values()}
    assert len(jobs) == 1, "one array for all"
    before = notes("plain")
    assert sweep("plain", "--seeds", "2").returncode == 0 and notes("plain") == before, "nothing is run twice"


LONG = ("--set", "train.steps=100000", "train.checkpoint_every=200", "train.log_every=1")


def one_is_cancelled_and_run_again() -> None:
    name, other = "trial-ffn=gelu-seed0", "trial-ffn=relu-seed0"
    with running("cancelled", *LONG):  # and killed in the end, which the other job does not notice
        wait_for(lambda: (scratch / "cancelled" / name / "metrics.jsonl").exists())
        both = notes("cancelled")
        subprocess.run(["scancel", both[name]["job"]], check=True)
        wait_for(lambda: notes("cancelled")[name]["event"] == "cancelled")
        assert states("cancelled", *LONG)[name] == "cancelled"
    with running("cancelled", *LONG) as again:
        wait_for(lambda: notes("cancelled")[name]["event"] == "started" and notes("cancelled")[name] != both[name])
        assert notes("cancelled")[other]["job"] == both[other]["job"], "found again in the queue, not doubled"
        again.terminate()
        assert again.wait(timeout=PATIENCE) == 75, "interrupted"
        print(again.stderr.read(), flush=True)
    assert [holder(scratch / "cancelled" / trial) for trial in (name, other)] == [None, None], "nothing is training"
    assert set(states("cancelled", *LONG).values()) == {"stopped"}, "by this command, not by scancel"
    assert verify(scratch / "cancelled" / other).returncode == 0, "the progress is saved"


def a_job_without_time_saves_and_the_same_command_resumes() -> None:
    """Slurm warns of the end two to three minutes before it, so that of four minutes one or two are left to train."""
    name, four = "trial-ffn=gelu-seed0", (*LONG, "--slurm.minutes", "4")
    assert sweep("short", *four).returncode == 3 and states("short", *LONG)[name] == "stopped"
    assert notes("short")[name]["code"] == 75
    before = steps(name)
    with running("short", *LONG) as process:
        wait_for(lambda: steps(name) > before)
        process.terminate()
        assert process.wait(timeout=PATIENCE) == 75


def steps(name: str) -> int:
    lines = (scratch / "short" / name / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["step"]


def verify(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(["gptjax", "verify", str(folder)], capture_output=True, text=True)


all_trials_are_done()
one_is_cancelled_and_run_again()
a_job_without_time_saves_and_the_same_command_resumes()
print("tests/slurm: all passed")
