"""What lies in a folder of runs: one record for each, whatever state it is in. Reads only, and executes nothing."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gptjax.atomic_io import LARGEST_TEXT, read_text
from gptjax.config import Experiment
from gptjax.errors import GptjaxError, RunError
from gptjax.lab.progress import state_of
from gptjax.lab.trials import SWEEP, Trial, read_sweep
from gptjax.training import lock
from gptjax.training.checkpoint import listing
from gptjax.training.metrics import read_metrics
from gptjax.training.run import EXPERIMENT, METRICS, PROVENANCE, RESULT, Run, open_run

State = Literal["finished", "running", "waiting", "stopped", "failed", "cancelled", "missing", "damaged", "imported"]
MARKS = (EXPERIMENT, PROVENANCE, METRICS, RESULT, lock.NAME)  # a folder with one of them is, or was, a run
LARGEST = 1e300  # of a figure: whole numbers in JSON have no bound, and floats have
SAMPLES = 1 << 20  # bytes: more of samples.txt than anybody reads


@dataclass(frozen=True)
class Record:
    """A run as it stands in its folder."""

    name: str  # how the reader calls it: the trial, or the path below the folder that was asked about
    folder: Path
    state: State
    why: str = ""  # of a run that is not finished, in a line
    step: int = 0  # the last that its files tell of
    experiment: Experiment | None = None  # None where there is none that can be read
    figures: Mapping[str, float] = field(default_factory=dict)  # every finite number of result.json, by dotted name
    diverged: frozenset[str] = frozenset()  # figures that were not finite when it ended
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def started(self) -> str:
        """When, in UTC."""
        return str(self.provenance.get("started", ""))[:16].replace("T", " ")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of its metrics.jsonl; none where they cannot be read, of which `state` and `why` tell."""
        try:
            return _metrics(self.folder)
        except (GptjaxError, OSError):
            return []

    def samples(self) -> str:
        """What it wrote at its end; empty where there is nothing."""
        try:
            return read_text(self.folder / "samples.txt", SAMPLES).strip("\n")
        except (GptjaxError, OSError):
            return ""


def look(folder: Path, name: str = "") -> Record:
    """The record of a folder; `missing` where there is none, `damaged` where it cannot be read as a run."""
    blank = Record(name or folder.name, folder, "damaged")
    try:
        if not folder.exists():
            return replace(blank, state="missing", why="has not begun")
        if (who := lock.holder(folder)) and not (folder / EXPERIMENT).exists():
            return replace(blank, state="running", why=f"{who} begins here")
        run = open_run(folder)
        lines = _metrics(folder)
        step = max([x["step"] for x in lines] + [c.step for c in listing(run.checkpoints)], default=0)
        provenance = run.provenance()
        seen = replace(blank, experiment=run.experiment, step=step, provenance=provenance)
        return replace(seen, **_state(run, step, who, "imported" in provenance))
    except (GptjaxError, OSError, ValueError, RecursionError) as e:
        return replace(blank, why=_one_line(e, folder))


def _state(run: Run, step: int, who: str | None, imported: bool) -> dict[str, Any]:
    steps = run.experiment.train.steps
    if who:
        return {"state": "running", "why": f"at step {step:,} of {steps:,}"}
    if (result := run.result()) is not None and not imported:
        found = dict(numbers(result))
        diverged = frozenset(
            name for name, value in result.items()
            if name.startswith("val_") and name not in found and not isinstance(value, dict)
        )  # fmt: skip
        return {"state": "finished", "figures": found, "diverged": diverged, "step": int(found.get("steps", step))}
    if imported:
        return {"state": "imported", "why": "weights of another library", "figures": dict(numbers(result or {}))}
    return {"state": "stopped", "why": f"at step {step:,} of {steps:,}"}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    if path.is_file() and (size := path.stat().st_size) > LARGEST_TEXT:
        raise RunError(f"{path}: has {size:,} bytes, more than the {LARGEST_TEXT:,} that are read")
    return [values for _, values in read_metrics(path)]


def look_at_trial(trial: Trial) -> Record:
    """The record of a sweep's trial; of one that has not ended, what the sweep or its last line tells of it besides."""
    record = look(trial.folder, trial.name)
    if record.state in ("missing", "stopped"):
        record = replace(record, **_what_happened(trial, record))
    return record if record.experiment else replace(record, experiment=trial.experiment)


def _what_happened(trial: Trial, record: Record) -> dict[str, Any]:
    try:
        told = state_of(trial)
    except (GptjaxError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # of a note that cannot be read
    begun = record.state == "stopped" or trial.log.exists()
    where = (record.why if record.state == "stopped" else "before its first step") if begun else record.why
    if told.status in ("failed", "cancelled", "waiting"):
        return {"state": told.status, "why": ": ".join(part for part in (where, " ".join(told.why.split())) if part)}
    words = _last_words(trial.log)
    return {"state": "stopped", "why": f"{where}; its last words: {words}" if words else where} if begun else {}


def _last_words(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((" ".join(line.split())[-300:] for line in reversed(lines) if line.strip()), "")


def find(folder: Path) -> list[Record]:
    """Every run below a folder, those of sweeps that have not begun among them. Raises `RunError` where it is none."""
    if not folder.is_dir():
        why = "is a file" if folder.exists() else "does not exist"
        raise RunError(f"{folder}: {why}; name a folder of runs, for instance the one that gptjax train makes, runs")
    found: dict[Path, Record] = {}
    for path in _candidates(folder):
        if (path / SWEEP).exists():
            try:
                trials = read_sweep(path)
            except (GptjaxError, OSError, ValueError, LookupError, TypeError, AttributeError) as e:
                found[path] = Record(_below(path, folder), path, "damaged", _one_line(e, path))
            else:
                found |= {t.folder: replace(look_at_trial(t), name=_below(t.folder, folder)) for t in trials}
        elif path not in found:
            found[path] = look(path, _below(path, folder))
    return list(found.values())


def _candidates(folder: Path) -> Iterator[Path]:
    """Folders that hold a sweep or a run, in order; links are not followed further down."""
    for root, folders, files in os.walk(folder):
        is_run = any(mark in files for mark in MARKS) or "checkpoints" in folders
        if is_run or SWEEP in files:
            yield Path(root)
        folders[:] = [] if is_run else sorted(name for name in folders if not name.startswith("."))
        yield from (
            path for name in folders if (path := Path(root, name)).is_symlink() and (path / EXPERIMENT).is_file()
        )


def numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers among JSON values by their dotted names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}.")
        elif type(value) in (int, float) and abs(value) < LARGEST and prefix + name != "format":
            yield prefix + name, value  # NaN is not below anything


def _below(path: Path, folder: Path) -> str:
    return path.name if path == folder else str(path.relative_to(folder))


def _one_line(e: Exception, folder: Path) -> str:
    told = f"{Path(str(e.filename)).name}: {e.strerror}" if isinstance(e, OSError) and e.filename else str(e)
    return " ".join(told.replace(f"{folder}/", "").replace(f"{folder}: ", "").split())[:300]
