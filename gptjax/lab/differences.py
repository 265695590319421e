"""How two runs, or the experiments of two files, differ: what was asked for, made with what, and what came out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.config import Experiment, diff
from gptjax.errors import RunError
from gptjax.lab.records import Record, look
from gptjax.lab.text_report import columns, figure
from gptjax.loading import load_experiment
from gptjax.training.run import EXPERIMENT

ENVIRONMENT = ("commit", "python", "versions", "devices", "processes", "data", "reference", "imported")


@dataclass(frozen=True)
class Side:
    """One of the two."""

    name: str
    experiment: Experiment
    record: Record | None  # of a run; None for an experiment file


def side(name: str) -> Side:
    """A run folder, or an experiment file, its dotted name, or its JSON. Only a file that the user names is executed.

    Raises `RunError` for a folder that is no run, `ConfigError` for a file that is no experiment.
    """
    folder = Path(name)
    if not folder.is_dir():
        return Side(name, load_experiment(name), None)
    if not (folder / EXPERIMENT).exists():
        raise RunError(f"{folder}: is no run folder: it holds no {EXPERIMENT}; name a run, or an experiment file")
    record = look(folder)
    if record.experiment is None:
        raise RunError(f"{folder}: is damaged ({record.why}); nothing can be compared with it")
    return Side(name, record.experiment, record)


def differences(a: Side, b: Side) -> dict[str, Any]:
    """`config` and `environment`: name -> [in a, in b], where they differ; `metrics`: name -> [in a, in b, b - a]."""
    first, second = _resolved(a, b), _resolved(b, a)
    config = {path: list(pair) for path, pair in diff(first, second).items()}
    if a.record is None or b.record is None:
        return {"config": config, "environment": {}, "metrics": {}}
    found = [_flat({k: s.record.provenance.get(k) for k in ENVIRONMENT}) for s in (a, b) if s.record]
    pairs = {name: [f.get(name) for f in found] for name in dict.fromkeys([*found[0], *found[1]])}
    x, y = a.record.figures, b.record.figures
    return {
        "config": config,
        "environment": {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
        "metrics": {
            name: [x.get(name), y.get(name), y[name] - x[name] if name in x and name in y else None]
            for name in dict.fromkeys([*x, *y])
        },
    }


def _resolved(own: Side, other: Side) -> Experiment:
    """Beside a run, whose derived fields are written out, those of a file are as well, where they can be known."""
    size = other.experiment.model.vocab_size
    if (
        own.record
        or not other.record
        or size is None
        or own.experiment.data.tokenizer != other.experiment.data.tokenizer
    ):
        return own.experiment
    return own.experiment.resolved(size, other.experiment.data.labels)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def as_text(a: Side, b: Side, found: Mapping[str, Any]) -> str:
    """Three tables, or a line in the place of one that would be empty."""
    parts = [f"A  {a.name}\nB  {b.name}"]
    for title, name in (("config", "config"), ("environment", "environment")):
        lines = [[path, str(x), str(y)] for path, (x, y) in found[name].items()]
        if name == "config" or (a.record and b.record):
            parts.append(columns([[title, "A", "B"], *lines]) if lines else f"{title}: no difference")
    if metrics := found["metrics"]:
        shown = lambda value, sign=False: "-" if value is None else figure(value, sign)  # noqa: E731
        rows = [[path, shown(x), shown(y), shown(gap, True)] for path, (x, y, gap) in metrics.items()]
        parts.append(columns([["metrics", "A", "B", "B - A"], *rows]))
    for s in (a, b):
        if s.record and s.record.state != "finished":
            parts.append(f"{s.name} is {s.record.state}: {s.record.why}")
    return "\n\n".join(parts)
