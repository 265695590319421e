"""Real `gptjax train` processes for the tests: one, or several that make up a job on this machine."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from compilation import QUICK_FLAGS

from gptjax.config import Experiment

ROOT = Path(__file__).parent.parent
PATIENCE = 600  # seconds until what has not happened is taken to hang, on a machine that others use as well
QUICK = {"XLA_FLAGS": QUICK_FLAGS, "JAX_PLATFORMS": "cpu"}


def write_experiment(folder: Path, experiment: Experiment) -> Path:
    """An experiment file that holds exactly this value."""
    path = folder / f"{experiment.name}.py"
    path.write_text(
        f"from gptjax.config import Experiment\nexperiment = Experiment.from_json({experiment.to_json()!r})\n"
    )
    return path


SLOW = """
import time
from gptjax.data.batches import DataLoader

whole = DataLoader.device_batch


def device_batch(*arguments, **more):
    time.sleep(0.1)
    return whole(*arguments, **more)


DataLoader.device_batch = device_batch
from gptjax.cli import main

main()
"""


def slowly(experiment: Path, run: Path) -> list[str]:
    """The command for `start` that trains a tenth of a second a step, so that there is time to disturb it."""
    script = experiment.with_name("slow.py")
    script.write_text(SLOW)
    return [sys.executable, str(script), "train", str(experiment), "--run-dir", str(run)]


def start(
    experiment: Path, run: Path, *options: str, command: list[str] | None = None, **environment: str
) -> subprocess.Popen:
    """One process, of `gptjax train` or another command; what it says comes out of `communicate`."""
    train = [sys.executable, "-m", "gptjax", "train", str(experiment), "--run-dir", str(run), *options]
    return subprocess.Popen(
        command or train,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | QUICK | environment,
    )


def start_job(count: int, experiment: Path, run: Path, *options: str, **more) -> list[subprocess.Popen]:
    """The processes of one job, which find each other over a port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    job |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    return [start(experiment, run, *options, **job | more, JAX_PROCESS_ID=str(i)) for i in range(count)]


def steps_logged(run: Path) -> list[int]:
    """The steps in metrics.jsonl so far, complete lines only."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def wait_for(done: Callable[[], object], what: str, process: subprocess.Popen, seconds: float = PATIENCE) -> None:
    """Returns when `done` says so; raises if the process ends or the time is over."""
    deadline = time.monotonic() + seconds
    while not done():
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode} before {what}: {process.communicate()[1]}")
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{what} did not come in {seconds} s: {process.communicate()[1]}")
        time.sleep(0.02)


def wait_for_step(run: Path, step: int, process: subprocess.Popen, seconds: float = PATIENCE) -> None:
    """Returns when a run has logged this step."""
    wait_for(lambda: max(steps_logged(run), default=0) >= step, f"step {step}", process, seconds)
