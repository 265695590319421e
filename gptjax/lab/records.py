"""One record for each run in a folder, whatever state it is in. Only reads files; executes nothing."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gptjax.atomic_io import LARGEST_TEXT, read_tail, read_text
from gptjax.config import Experiment
from gptjax.errors import GptjaxError, RunError
from gptjax.lab.progress import state_of
from gptjax.lab.trials import SWEEP, Trial, read_sweep
from gptjax.training import lock
from gptjax.training.checkpoint import listing
from gptjax.training.metrics import read_metrics
from gptjax.training.run import EXPERIMENT, METRICS, PROVENANCE, RESULT, Run, open_run

RunState = Literal["finished", "running", "waiting", "stopped", "failed", "cancelled", "missing", "damaged", "imported"]
MARKS = (EXPERIMENT, PROVENANCE, METRICS, RESULT, lock.NAME)  # a folder with one of these files is or was a run
MAX_NUMBER = 1e300  # integers in JSON have no bound, and floats do
MAX_SAMPLES = 1 << 20  # bytes of samples.txt


@dataclass(frozen=True)
class RunRecord:
    """The state of a run, read from its folder."""

    name: str  # the trial's name, or the path below the listed folder
    folder: Path
    state: RunState
    why: str = ""  # one line about a run that is not finished
    step: int = 0  # the last one in its files
    experiment: Experiment | None = None  # None if it cannot be read
    final_metrics: Mapping[str, float] = field(
        default_factory=dict
    )  # the finite numbers of result.json, by dotted name
    diverged: frozenset[str] = frozenset()  # the final metrics that are not finite
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def started(self) -> str:
        """The start time in UTC."""
        return str(self.provenance.get("started", ""))[:16].replace("T", " ")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of its metrics.jsonl; empty if they cannot be read (then `state` is `damaged`)."""
        try:
            return _metrics(self.folder)
        except (GptjaxError, OSError):
            return []

    def samples(self) -> str:
        """The samples written at the end of training; empty if there are none."""
        try:
            return read_text(self.folder / "samples.txt", MAX_SAMPLES).strip("\n")
        except (GptjaxError, OSError):
            return ""


def inspect_run(folder: Path, name: str = "") -> RunRecord:
    """The record of a run folder: `missing` if there is no folder, `damaged` if it cannot be read as a run."""
    blank = RunRecord(name or folder.name, folder, "damaged")
    try:
        if not folder.exists():
            return replace(blank, state="missing", why="has not started")
        if (who := lock.holder(folder)) and not (folder / EXPERIMENT).exists():
            return replace(blank, state="running", why=f"{who} is starting here")
        run = open_run(folder)
        lines = _metrics(folder)
        step = max([x["step"] for x in lines] + [c.step for c in listing(run.checkpoints)], default=0)
        provenance = run.provenance()
        known = replace(blank, experiment=run.experiment, step=step, provenance=provenance)
        return replace(known, **_state(run, step, who, "imported" in provenance))
    except (GptjaxError, OSError, ValueError, RecursionError) as e:
        return replace(blank, why=_one_line(e, folder))


def _state(run: Run, step: int, who: str | None, imported: bool) -> dict[str, Any]:
    steps = run.experiment.train.steps
    if who:
        return {"state": "running", "why": f"at step {step:,} of {steps:,}"}
    if (result := run.result()) is not None and not imported:
        found = dict(finite_numbers(result))
        diverged = frozenset(
            name for name, value in result.items()
            if name.startswith("val_") and name not in found and not isinstance(value, dict)
        )  # fmt: skip
        return {
            "state": "finished",
            "final_metrics": found,
            "diverged": diverged,
            "step": int(found.get("steps", step)),
        }
    if imported:
        return {"state": "imported", "why": "imported weights", "final_metrics": dict(finite_numbers(result or {}))}
    return {"state": "stopped", "why": f"at step {step:,} of {steps:,}"}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / METRICS
    if path.is_file() and (size := path.stat().st_size) > LARGEST_TEXT:
        raise RunError(f"{path}: has {size:,} bytes; at most {LARGEST_TEXT:,} are read")
    return [values for _, values in read_metrics(path)]


def inspect_trial(trial: Trial) -> RunRecord:
    """The record of a sweep's trial. For an unfinished one, `why` also uses the sweep's note and the trial's log."""
    record = inspect_run(trial.folder, trial.name)
    if record.state in ("missing", "stopped"):
        record = replace(record, **_unfinished_state(trial, record))
    return record if record.experiment else replace(record, experiment=trial.experiment)


def _unfinished_state(trial: Trial, record: RunRecord) -> dict[str, Any]:
    try:
        trial_state = state_of(trial)
    except (GptjaxError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # the note cannot be read
    started = record.state == "stopped" or trial.log.exists()
    where = "before its first step" if started and record.state != "stopped" else record.why
    if trial_state.status in ("failed", "cancelled", "waiting"):
        reason = " ".join(trial_state.why.split())
        return {"state": trial_state.status, "why": ": ".join(part for part in (where, reason) if part)}
    if not started:
        return {}
    last_line = _last_line(trial.log)
    return {"state": "stopped", "why": f"{where}; last line of its log: {last_line}" if last_line else where}


def _last_line(log: Path) -> str:
    try:
        lines = read_tail(log, 4096).split("\n")
    except (OSError, RunError):
        return ""
    return next((" ".join(line.split())[-300:] for line in reversed(lines) if line.strip()), "")


def find_runs(folder: Path) -> list[RunRecord]:
    """Every run below a folder, including trials that have not started. Raises `RunError` if it is not a folder."""
    if not folder.is_dir():
        why = "is a file" if folder.exists() else "does not exist"
        raise RunError(f"{folder}: {why}; name a folder of runs, for instance runs, which gptjax train creates")
    found: dict[Path, RunRecord] = {}
    for path in _candidates(folder):
        if (path / SWEEP).exists():
            try:
                trials = read_sweep(path)
            except (GptjaxError, OSError, ValueError, LookupError, TypeError, AttributeError) as e:
                found[path] = RunRecord(_relative_name(path, folder), path, "damaged", _one_line(e, path))
            else:
                found |= {t.folder: replace(inspect_trial(t), name=_relative_name(t.folder, folder)) for t in trials}
        elif path not in found:
            found[path] = inspect_run(path, _relative_name(path, folder))
    return list(found.values())


def _candidates(folder: Path) -> Iterator[Path]:
    """The folders that hold a sweep or a run, in order. Links are not followed further down."""
    for root, folders, files in os.walk(folder):
        is_run = any(mark in files for mark in MARKS) or "checkpoints" in folders
        if is_run or SWEEP in files:
            yield Path(root)
        folders[:] = [] if is_run else sorted(name for name in folders if not name.startswith("."))
        yield from (
            path for name in folders if (path := Path(root, name)).is_symlink() and (path / EXPERIMENT).is_file()
        )


def finite_numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers among JSON values, by dotted name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from finite_numbers(value, f"{prefix}{name}.")
        elif type(value) in (int, float) and abs(value) < MAX_NUMBER and prefix + name != "format":
            yield prefix + name, value  # NaN fails this comparison


def _relative_name(path: Path, folder: Path) -> str:
    return path.name if path == folder else str(path.relative_to(folder))


def _one_line(e: Exception, folder: Path) -> str:
    text = str(e)
    if isinstance(e, OSError) and e.filename:
        text = f"{Path(str(e.filename)).name}: {e.strerror}"
    return " ".join(text.replace(f"{folder}/", "").replace(f"{folder}: ", "").split())[:300]
