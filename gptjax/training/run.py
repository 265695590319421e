"""The run folder: everything that a run saves.

experiment.json   the resolved experiment
provenance.json   versions, devices, data and command; see provenance.py
metrics.jsonl     one line per logged step: the source of truth for plots and trackers
checkpoints/      see checkpoint.py
tokenizer/        see data/tokenizer/
result.json       the final metrics
generation.json   generation settings of an imported model, or of a run that started from one
lock.json         the process that is training here; see lock.py
processes/        heartbeats of a job with several processes; see watchdog.py
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.atomic_io import format_bytes, read_json, read_text, write_atomic
from gptjax.config import Experiment
from gptjax.data import tokenizer
from gptjax.data.splits import source_names
from gptjax.data.store import Store
from gptjax.data.synthetic import is_function
from gptjax.errors import RunError
from gptjax.inference.pretrained import Pretrained
from gptjax.training import lock, watchdog
from gptjax.training.metrics import read_metrics

FORMAT_VERSION = 1
EXPERIMENT, PROVENANCE, METRICS, RESULT = "experiment.json", "provenance.json", "metrics.jsonl", "result.json"
GENERATION = "generation.json"
COMPARED = ("data", "model.context_length", "objective", "reference")  # what a validation loss depends on
BEFORE_EXPERIMENT = {
    lock.NAME,
    watchdog.FOLDER,
    "tokenizer",
    PROVENANCE,
    GENERATION,
}  # may exist before experiment.json


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
        return read_json(self.folder / PROVENANCE)

    def data_key(self) -> str:
        """The key of its training text. Raises `RunError` for an imported model, which has none."""
        provenance = self.provenance()
        if "imported" in provenance:
            raise RunError(
                f"{self.folder}: holds weights imported from {provenance['imported']}, without training text and train "
                f"state; to train on, start another run with --init {self.folder}"
            )
        return provenance["data"]

    def result(self) -> dict[str, Any] | None:
        """The final metrics; None while the run is not finished."""
        path = self.folder / RESULT
        return read_json(path) if path.exists() else None

    def generation_settings(self) -> dict[str, Any]:
        """The generation settings of an imported model; empty for other runs."""
        path = self.folder / GENERATION
        return read_json(path) if path.exists() else {}

    def write_result(self, metrics: dict[str, Any]) -> None:
        write_atomic(self.folder / RESULT, json.dumps({"format": FORMAT_VERSION} | metrics, indent=2) + "\n")

    def last_change_of_text(self) -> int:
        """The last step at which text, context or objective changed, so that losses are not comparable; else -1."""
        changes = self.provenance().get("changes", [])
        steps = [c["step"] for c in changes if any(f.startswith(COMPARED) for f in c["fields"])]
        return max(steps, default=-1)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; an unfinished last line is left out."""
        return [values for _, values in read_metrics(self.folder / METRICS)]


def open_run(folder: Path) -> Run:
    """The run in a folder. Raises `RunError` if there is none, or if links lead out of it."""
    path = folder / EXPERIMENT
    if not path.is_file():
        why = "does not exist" if not folder.exists() else f"is not a run folder: it has no {EXPERIMENT}"
        raise RunError(f"{folder}: {why}; name a folder made by gptjax train, such as runs/quickstart")
    _check_contained(folder)
    try:
        return Run(folder, Experiment.from_json(read_text(path)))
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise RunError(f"{path}: is damaged ({e}); it cannot be read as an experiment") from None


def check_imports(run: Run, store: Store | None) -> None:
    """Raises `RunError` if the experiment of a run folder, which may be untrusted, names a function to import.

    A `function:` source whose text is already in a `store` is not imported, and is accepted.
    """
    e = run.experiment
    named = {"objective.name": e.objective.name, "objective.reward": e.objective.reward}
    named = {field: name for field, name in named.items() if ":" in name}
    if store is None:
        sources = {"data.source": e.data.source, "data.val_source": e.data.val_source}
        named |= {field: s for field, given in sources.items() for s in source_names(given) if is_function(s)}
    for field, name in named.items():
        raise RunError(
            f"{run.folder}: {field} = {name!r} names code, which is imported for an "
            "experiment file only; evaluate the run with --data or --tasks"
        )


def _check_contained(folder: Path) -> None:
    """Everything in a run folder, which may be untrusted, must be a plain file or folder inside it."""
    home = folder.resolve()
    for root, folders, files in os.walk(folder):
        for path in (Path(root, name) for name in [*folders, *files]):
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                raise RunError(f"{path}: is a link out of the run folder, which gptjax does not follow; remove it")
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise RunError(f"{path}: is neither a file nor a folder; remove it")


def check_folder(folder: Path) -> None:
    """Raises `RunError` if a run could not be saved in this folder."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file; choose another --run-dir")
    there = list(folder.iterdir()) if folder.exists() and not (folder / EXPERIMENT).exists() else []
    if strange := [path for path in there if path.name not in BEFORE_EXPERIMENT and not is_scratch(path)]:
        raise RunError(
            f"{folder}: holds other files but no run ({strange[0].name}); choose another --run-dir, or empty it"
        )
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        write_atomic(probe, "probe")
        probe.unlink()
        if new:
            folder.rmdir()  # until there is a run to save
    except OSError as e:
        raise RunError(f"{folder}: cannot be written ({e.strerror}); choose another --run-dir") from None


def check_room(folder: Path, needed: int) -> None:
    """Raises `RunError` if the disk of a run folder has no space for a checkpoint of `needed` bytes."""
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < needed:
        raise RunError(
            f"{folder}: has {format_bytes(free)} free, and one checkpoint takes {format_bytes(needed)}; free some "
            "space, or choose another --run-dir"
        )


def write_generation(folder: Path, pretrained: Pretrained) -> None:
    """Saves the generation settings of a model in a run folder."""
    write_json(folder / GENERATION, {"format": FORMAT_VERSION} | pretrained.generation_settings())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes an indented JSON file of a run folder."""
    write_atomic(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def check_data(run: Run, store: Store) -> None:
    """Raises `RunError` if the text of a run has changed since it started."""
    if (key := run.data_key()) != store.key:
        raise RunError(
            f"{run.folder}: was trained on data {key}, but {run.experiment.data.source!r} is now {store.key}; "
            "restore the old text"
        )


def is_scratch(path: Path) -> bool:
    return re.fullmatch(r"\.+(experiment|provenance|generation|metrics|result|probe)\b.*\.\d+", path.name) is not None
