"""How two runs, or the experiments of two files, differ: config, environment and final metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.config import Experiment, diff
from gptjax.errors import RunError
from gptjax.lab.records import RunRecord, inspect_run
from gptjax.lab.text_report import columns, format_number
from gptjax.loading import load_experiment
from gptjax.training.run import EXPERIMENT

ENVIRONMENT = ("commit", "python", "versions", "devices", "processes", "data", "reference", "imported")


@dataclass(frozen=True)
class DiffSide:
    """One side of a diff."""

    name: str
    experiment: Experiment
    record: RunRecord | None  # None for an experiment file


def load_side(name: str) -> DiffSide:
    """Loads a run folder, or an experiment by its file, dotted name or JSON. Executes only a file that the user names.

    Raises `RunError` for a folder that is not a run, `ConfigError` for a file that does not define an experiment.
    """
    folder = Path(name)
    if not folder.is_dir():
        return DiffSide(name, load_experiment(name), None)
    if not (folder / EXPERIMENT).exists():
        raise RunError(f"{folder}: is not a run folder: it has no {EXPERIMENT}; name a run or an experiment file")
    record = inspect_run(folder)
    if record.experiment is None:
        raise RunError(f"{folder}: is damaged ({record.why}), so it cannot be compared")
    return DiffSide(name, record.experiment, record)


def differences(a: DiffSide, b: DiffSide) -> dict[str, Any]:
    """`config` and `environment`: name -> [in a, in b], where they differ; `metrics`: name -> [in a, in b, b - a]."""
    config = {path: list(pair) for path, pair in diff(_resolved(a, b), _resolved(b, a)).items()}
    if a.record is None or b.record is None:
        return {"config": config, "environment": {}, "metrics": {}}
    environments = [_flatten({k: s.record.provenance.get(k) for k in ENVIRONMENT}) for s in (a, b) if s.record]
    names = dict.fromkeys([*environments[0], *environments[1]])
    pairs = {name: [e.get(name) for e in environments] for name in names}
    x, y = a.record.final_metrics, b.record.final_metrics
    return {
        "config": config,
        "environment": {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
        "metrics": {
            name: [x.get(name), y.get(name), y[name] - x[name] if name in x and name in y else None]
            for name in dict.fromkeys([*x, *y])
        },
    }


def _resolved(this: DiffSide, other: DiffSide) -> Experiment:
    """The experiment to compare: if the other side is a run, the known derived fields of a file are filled in."""
    experiment = this.experiment
    if this.record or not other.record:
        return experiment
    vocab_size = other.experiment.model.vocab_size
    if vocab_size is None or experiment.data.tokenizer != other.experiment.data.tokenizer:
        return experiment
    return experiment.resolved(vocab_size, other.experiment.data.labels)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def as_text(a: DiffSide, b: DiffSide, found: Mapping[str, Any]) -> str:
    """Three tables; one line instead of an empty table."""
    parts = [f"A  {a.name}\nB  {b.name}"]
    for title, name in (("config", "config"), ("environment", "environment")):
        lines = [[path, str(x), str(y)] for path, (x, y) in found[name].items()]
        if name == "config" or (a.record and b.record):
            parts.append(columns([[title, "A", "B"], *lines]) if lines else f"{title}: no difference")
    if metrics := found["metrics"]:
        text = lambda value, sign=False: "-" if value is None else format_number(value, sign)  # noqa: E731
        rows = [[path, text(x), text(y), text(gap, True)] for path, (x, y, gap) in metrics.items()]
        parts.append(columns([["metrics", "A", "B", "B - A"], *rows]))
    for s in (a, b):
        if s.record and s.record.state != "finished":
            parts.append(f"{s.name} is {s.record.state}: {s.record.why}")
    return "\n\n".join(parts)
