"""The run folder: everything that a run leaves, and all that any verb needs.

experiment.json   what was trained, resolved
provenance.json   with which versions, devices, data and command
metrics.jsonl     one line a logged step: the source of truth, of which plots are views
checkpoints/      see checkpoint.py
tokenizer/        see data/tokenizer.py
result.json       the final figures
"""

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from gptjax import sharding
from gptjax.config import Experiment, diff
from gptjax.data import tokenizer
from gptjax.data.store import Store
from gptjax.errors import RunError
from gptjax.training.checkpoint import write_durably

FORMAT_VERSION = 1
EXPERIMENT, PROVENANCE, METRICS, RESULT = "experiment.json", "provenance.json", "metrics.jsonl", "result.json"


@dataclass(frozen=True)
class Run:
    """A run folder that holds an experiment."""

    folder: Path
    experiment: Experiment

    @property
    def checkpoints(self) -> Path:
        return self.folder.absolute() / "checkpoints"  # Orbax takes no relative paths

    def tokenizer(self) -> tokenizer.Tokenizer:
        return tokenizer.load(self.folder / "tokenizer")

    def provenance(self) -> dict[str, Any]:
        return json.loads((self.folder / PROVENANCE).read_text())

    def result(self) -> dict[str, Any] | None:
        """The final figures; None while the run is not finished."""
        path = self.folder / RESULT
        return json.loads(path.read_text()) if path.exists() else None

    def write_result(self, figures: dict[str, Any]) -> None:
        write_durably(self.folder / RESULT, json.dumps({"format": FORMAT_VERSION} | figures, indent=2) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; an unfinished last line is left out."""
        path = self.folder / METRICS
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


def open_run(folder: Path) -> Run:
    """The run in a folder. Raises `RunError` where there is none."""
    path = folder / EXPERIMENT
    if not path.is_file():
        why = "does not exist" if not folder.exists() else f"is no run folder: it holds no {EXPERIMENT}"
        raise RunError(f"{folder}: {why}; name a folder that gptjax train made, runs/quickstart for instance")
    try:
        return Run(folder, Experiment.from_json(path.read_text()))
    except (ValueError, TypeError, AttributeError) as e:
        raise RunError(f"{path}: is damaged ({e}); it cannot be read as an experiment") from None


def check_folder(folder: Path) -> None:
    """Raises `RunError` at once where a run could not be kept."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file; choose another --run-dir")
    if folder.exists() and not (folder / EXPERIMENT).exists() and any(folder.iterdir()):
        raise RunError(f"{folder}: holds other files and no run; choose another --run-dir, or empty it")
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.write_text("probe")
        probe.unlink()
        if new:
            folder.rmdir()  # until there is a run to keep in it
    except OSError as e:
        raise RunError(f"{folder}: cannot be written ({e.strerror}); choose another --run-dir") from None


def start_run(folder: Path, experiment: Experiment, store: Store) -> Run:
    """The run folder of a resolved experiment: a new one, or the one that stands there if it is the same experiment.

    Raises `RunError` with the difference where another experiment or other data stands there.
    """
    run = Run(folder, experiment)
    if jax.process_index() == 0:
        if (folder / EXPERIMENT).exists():
            _check_same(run, store)
        else:
            (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
            store.tokenizer.save(folder / "tokenizer")
            write_durably(folder / PROVENANCE, json.dumps(_provenance(store), indent=2) + "\n")
            write_durably(folder / EXPERIMENT, experiment.to_json())  # last: from here on it is a run
    sharding.wait_for_all("the run folder stands")
    return run


def _check_same(run: Run, store: Store) -> None:
    if differences := diff(open_run(run.folder).experiment, run.experiment):
        lines = [f"  - {path}: {old!r} there, {new!r} now" for path, (old, new) in differences.items()]
        raise RunError(
            f"{run.folder}: holds another experiment; take the same values, or another --run-dir:\n" + "\n".join(lines)
        )
    check_data(run, store)


def check_data(run: Run, store: Store) -> None:
    """Raises `RunError` where a run's text is not what it was when the run began."""
    if (key := run.provenance()["data"]) != store.key:
        raise RunError(
            f"{run.folder}: was trained on data {key}, but {run.experiment.data.source!r} is now {store.key}; "
            "bring the old text back, or train in another --run-dir"
        )


def _provenance(store: Store) -> dict[str, Any]:
    packages = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.devices()[0]
    return {
        "format": FORMAT_VERSION,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": _commit(),
        "data": store.key,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "devices": {"count": jax.device_count(), "kind": device.device_kind, "platform": device.platform},
        "processes": jax.process_count(),
    }


def _commit() -> str | None:
    """The git commit of the source, "+" where it has changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        say = lambda *args: subprocess.run(  # noqa: E731
            ["git", "-C", here, *args], capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()
        return say("rev-parse", "HEAD") + ("+" if say("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
