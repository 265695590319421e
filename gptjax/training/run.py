"""The run folder: everything that a run leaves, and all that any verb needs.

experiment.json   what was trained, resolved
provenance.json   with which versions, devices, data and command
metrics.jsonl     one line a logged step: the source of truth, of which plots are views
checkpoints/      see checkpoint.py
tokenizer/        see data/tokenizer.py
result.json       the final figures
generation.json   of an imported model, or one that began with it: how its makers recommend to sample from it
lock.json         who is training here, while someone is; see lock.py
processes/        what each process of a job over several does; see watch.py
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from gptjax.atomic_io import read_json, read_text, write_atomic
from gptjax.config import Experiment, diff
from gptjax.data import tokenizer
from gptjax.data.batches import DataPosition
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
UNBORN = {lock.NAME, watchdog.FOLDER, "tokenizer", PROVENANCE, GENERATION}  # what may stand there before an experiment


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
        """The key of the text that it was trained on. Raises `RunError` for an imported model, which has none here."""
        provenance = self.provenance()
        if "imported" in provenance:
            raise RunError(
                f"{self.folder}: holds weights imported from {provenance['imported']}, without the text that they were "
                "trained on and the state to train on from; to train on, begin another run with "
                f"--init {self.folder}"
            )
        return provenance["data"]

    def result(self) -> dict[str, Any] | None:
        """The final figures; None while the run is not finished."""
        path = self.folder / RESULT
        return read_json(path) if path.exists() else None

    def generation_settings(self) -> dict[str, Any]:
        """`generation_config`, `stop_tokens`, `chat_template` and `extra_generation_config` of an imported model; of any other nothing."""
        path = self.folder / GENERATION
        return read_json(path) if path.exists() else {}

    def write_result(self, figures: dict[str, Any]) -> None:
        write_atomic(self.folder / RESULT, json.dumps({"format": FORMAT_VERSION} | figures, indent=2) + "\n")

    def last_change_of_text(self) -> int:
        """The step from which on validation losses are of today's text, context and objective; -1 from the first."""
        changes = self.provenance().get("changes", [])
        told = [c["step"] for c in changes if any(f.startswith(COMPARED) for f in c["fields"])]
        return max(told, default=-1)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; an unfinished last line is left out."""
        return [values for _, values in read_metrics(self.folder / METRICS)]


def open_run(folder: Path) -> Run:
    """The run in a folder. Raises `RunError` where there is none, or where links lead out of it."""
    path = folder / EXPERIMENT
    if not path.is_file():
        why = "does not exist" if not folder.exists() else f"is no run folder: it holds no {EXPERIMENT}"
        raise RunError(f"{folder}: {why}; name a folder that gptjax train made, runs/quickstart for instance")
    _check_contained(folder)
    try:
        return Run(folder, Experiment.from_json(read_text(path)))
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise RunError(f"{path}: is damaged ({e}); it cannot be read as an experiment") from None


def check_imports(run: Run, store: Store | None) -> None:
    """A run folder may be a stranger's: raises `RunError` where its experiment names a function to be imported.

    A function that has made its text already, so that there is a `store` of it, is not needed again.
    """
    e = run.experiment
    named = {"objective.reward": e.objective.reward} if ":" in e.objective.reward else {}
    if store is None:
        sources = {"data.source": e.data.source, "data.val_source": e.data.val_source}
        named |= {field: s for field, given in sources.items() for s in source_names(given) if is_function(s)}
    for field, name in named.items():
        raise RunError(
            f"{run.folder}: {field} = {name!r} names a function, which is imported for an "
            "experiment file only; evaluate the run with --data or --task"
        )


def _check_contained(folder: Path) -> None:
    """A run folder may come from a stranger: everything in it must be a plain file or folder that lies in it."""
    home = folder.resolve()
    for root, folders, files in os.walk(folder):
        for path in (Path(root, name) for name in [*folders, *files]):
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                raise RunError(f"{path}: is a link that leads out of the run folder; gptjax does not follow it")
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise RunError(f"{path}: is neither a file nor a folder; remove it")


def check_folder(folder: Path) -> None:
    """Raises `RunError` at once where a run could not be kept."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file; choose another --run-dir")
    there = list(folder.iterdir()) if folder.exists() and not (folder / EXPERIMENT).exists() else []
    if strange := [path for path in there if path.name not in UNBORN and not _is_scratch(path)]:
        raise RunError(
            f"{folder}: holds other files and no run ({strange[0].name}); choose another --run-dir, or empty it"
        )
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        write_atomic(probe, "probe")
        probe.unlink()
        if new:
            folder.rmdir()  # until there is a run to keep in it
    except OSError as e:
        raise RunError(f"{folder}: cannot be written ({e.strerror}); choose another --run-dir") from None


def check_room(folder: Path, needed: int) -> None:
    """Raises `RunError` where the disk of a run folder has no room for a checkpoint of `needed` bytes."""
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < needed:
        raise RunError(
            f"{folder}: has {free / 1e9:.2f} GB free, and one checkpoint takes {needed / 1e9:.2f} GB; make room, or "
            "choose another --run-dir"
        )


COUNTED = ("optim.noise_multiplier", "optim.clip_norm", "train.batch_size", "model.context_length", "data")
Changes = dict[str, tuple[Any, Any]]  # dotted field, or "data" -> (value there, value now)


def start_run(
    folder: Path,
    experiment: Experiment,
    store: Store,
    allow_changes: bool = False,
    init: Callable[[], Pretrained] | None = None,
    reference: str | None = None,
) -> Changes:
    """Makes the run folder of a resolved experiment; or returns how the one that stands there differs from it.

    What is recommended for the model that it starts from, `init`, is kept for the new run; and the fingerprint of the
    `reference` beside it, where there is one and it is needed.

    For the holder of the lock. Raises `RunError` with the differences, unless they are allowed.
    """
    for scratch in filter(_is_scratch, folder.iterdir()):
        scratch.unlink()  # of a process that was killed while it wrote
    if not (folder / EXPERIMENT).exists():
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        store.tokenizer.save(folder / "tokenizer")
        if init is not None and any(init().generation_settings().values()):
            write_generation(folder, init())
        beside = {"reference": reference} if reference else {}
        write_atomic(folder / PROVENANCE, json.dumps(new_provenance(store.key) | beside, indent=2) + "\n")
        write_atomic(folder / EXPERIMENT, experiment.to_json())  # last: from here on it is a run
        return {}
    run = open_run(folder)
    key = run.data_key()
    changes = diff(run.experiment, experiment)
    if key != store.key:
        changes["data"] = (key, store.key)
    before = run.provenance().get("reference")
    if reference and before and before != reference:
        changes["reference"] = (before, reference)
    if changes and not allow_changes:
        raise RunError(
            f"{folder}: holds another experiment; take the same values, choose another --run-dir, or go on with the "
            "new values by --allow-changes:\n" + "\n".join(lines(changes))
        )
    private = [e.optim.noise_multiplier is not None for e in (run.experiment, experiment)]
    if any(private) and (counted := [path for path in COUNTED if path in changes]):
        raise RunError(
            f"{folder}: what a private run has spent is counted for one noise, batch size, context and text, so that "
            f"{', '.join(counted)} cannot change on the way; choose another --run-dir"
        )
    if run.tokenizer().id_to_bytes != store.tokenizer.id_to_bytes:
        raise RunError(
            f"{folder}: was trained with another tokenizer, so its ids mean other text; choose another --run-dir"
        )
    return changes


def write_generation(folder: Path, pretrained: Pretrained) -> None:
    """Keeps in a run folder how to sample from a model."""
    write_json(folder / GENERATION, {"format": FORMAT_VERSION} | pretrained.generation_settings())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A JSON file of a run folder, for people to read as well."""
    write_atomic(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def lines(changes: Changes) -> list[str]:
    """Each change as a line of its own."""
    named = {
        "data": "data (SHA-256 of text, tokenizer and split)",
        "reference": "the weights of the model beside it (SHA-256)",
    }
    return [f"  - {named.get(path, path)}: {old!r} there, {new!r} now" for path, (old, new) in changes.items()]


def accept_changes(run: Run, experiment: Experiment, store: Store, changes: Changes, position: DataPosition) -> None:
    """Makes an experiment the run's own from this position on; provenance.json keeps what was changed, and when."""
    provenance = run.provenance()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    change = {"when": now, "step": position.step, "samples": position.samples, "tokens": position.tokens, "fields": changes}
    provenance["changes"] = [*provenance.get("changes", []), change]
    now_used = {"data": store.key} | ({"reference": changes["reference"][1]} if "reference" in changes else {})
    write_atomic(run.folder / PROVENANCE, json.dumps(provenance | now_used, indent=2) + "\n")
    write_atomic(run.folder / EXPERIMENT, experiment.to_json())


def set_aside_later(run: Run, step: int) -> None:
    """Keeps, under other names, the figures of a run that goes on from an earlier step or in another way."""
    for name in (METRICS, RESULT):
        path = run.folder / name
        if path.exists():
            number = 1
            while (kept := path.with_stem(f"{path.stem}-before-step-{step}-again-{number}")).exists():
                number += 1
            shutil.copy2(path, kept) if name == METRICS else path.rename(kept)


def check_data(run: Run, store: Store) -> None:
    """Raises `RunError` where a run's text is not what it was when the run began."""
    if (key := run.data_key()) != store.key:
        raise RunError(
            f"{run.folder}: was trained on data {key}, but {run.experiment.data.source!r} is now {store.key}; "
            "bring the old text back"
        )


def _is_scratch(path: Path) -> bool:
    return re.fullmatch(r"\.+(experiment|provenance|generation|metrics|result|probe)\b.*\.\d+", path.name) is not None


def new_provenance(data: str | None) -> dict[str, Any]:
    """With which versions, devices and command, and on which data, a run folder is made now."""
    packages = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.devices()[0]
    return {
        "format": FORMAT_VERSION,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": _commit(),
        "data": data,
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
