"""Groups runs into variants: runs that differ only in their seed are one variant."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptjax.checks import MAX_NAME
from gptjax.config import Experiment
from gptjax.errors import RunError
from gptjax.lab.labels import short_labels
from gptjax.lab.records import RunRecord, inspect_run, inspect_trial
from gptjax.lab.trials import SWEEP, read_sweep
from gptjax.training.run import EXPERIMENT


@dataclass(frozen=True)
class Variant:
    """Runs that differ only in their seed."""

    name: str
    records: tuple[RunRecord, ...]  # sorted by seed, one for each
    label: str  # the name, shortened for tables and charts

    @property
    def experiment(self) -> Experiment | None:
        """The experiment, resolved if any of its runs has started."""
        known = [r.experiment for r in self.records if r.experiment is not None]
        return next((e for e in known if e.model.vocab_size is not None), known[0] if known else None)

    @property
    def finished(self) -> tuple[RunRecord, ...]:
        return tuple(r for r in self.records if r.state == "finished")

    def by_seed(self, metric: str) -> dict[int, float]:
        """Seed -> the final metric, for each finished run that has it."""
        return {seed_of(r): r.final_metrics[metric] for r in self.finished if metric in r.final_metrics}


def seed_of(record: RunRecord) -> int:
    assert record.experiment is not None, "a run without an experiment belongs to no variant"
    return record.experiment.seed


def variants_of(folders: Iterable[Path]) -> tuple[list[Variant], list[str]]:
    """The variants in runs and sweeps, in their order, and messages about runs that were left out.

    A sweep names its own variants. Other runs, and runs of several sweeps, form one variant if their experiments differ
    only in name and seed. Raises `RunError` for a folder that is neither a run nor a sweep, and if no run is left.
    """
    groups: list[tuple[str, list[RunRecord]]] = []
    left_out: list[str] = []
    for folder in dict.fromkeys(path.resolve() for path in folders):
        own: dict[str, list[RunRecord]] = {}  # the variants of this sweep
        for name, record in _records(folder, left_out):
            same = own.get(name) or next((records for _, records in groups if _are_alike(record, records)), None)
            if same is None:
                named = record.experiment.name if record.experiment else record.name
                groups.append((name or _without_seed(named[:MAX_NAME]), same := []))
            if name:
                own[name] = same
            if any(seed_of(r) == seed_of(record) for r in same):
                left_out.append(f"{record.name}: there are two runs with seed {seed_of(record)}; the first one counts")
            else:
                same.append(record)
    if not groups:
        raise RunError("there is nothing to report: " + ("; ".join(left_out) or "no run was given"))
    return _named(groups), left_out


def _records(folder: Path, left_out: list[str]) -> list[tuple[str, RunRecord]]:
    """The runs in a folder given by the user, each with the variant that a sweep gives it, else an empty name."""
    if (folder / SWEEP).is_file():
        try:
            return [(trial.variant, _check_seed(inspect_trial(trial), trial.seed)) for trial in read_sweep(folder)]
        except (LookupError, TypeError, AttributeError) as e:
            raise RunError(f"{folder / SWEEP}: is damaged ({type(e).__name__}: {e})") from None
    if not (folder / EXPERIMENT).is_file():
        why = "is neither a run nor a sweep" if folder.exists() else "does not exist"
        raise RunError(f"{folder}: {why}; gptjax runs FOLDER lists the runs of a folder")
    record = inspect_run(folder)
    if record.experiment is None:
        left_out.append(f"{record.name}: {record.why}")
        return []
    return [("", record)]


def _check_seed(record: RunRecord, seed: int) -> RunRecord:
    """Raises `RunError` if a trial's folder holds a run with another seed: runs would be paired wrongly."""
    if record.experiment is not None and record.experiment.seed != seed:
        problem = f"{record.folder}: holds a run with seed {record.experiment.seed}, but sweep.json says {seed}"
        raise RunError(f"{problem}; move the run to another folder and run the sweep again")
    return record


def _are_alike(record: RunRecord, records: Sequence[RunRecord]) -> bool:
    a, b = record.experiment, records[0].experiment
    if a is None or b is None:
        return False
    a, b = _with_vocab_size(a, b), _with_vocab_size(b, a)
    return a == replace(b, name=a.name, seed=a.seed)


def _with_vocab_size(e: Experiment, other: Experiment) -> Experiment:
    """An experiment that has not started, with the vocabulary size of another that has."""
    vocab_size = other.model.vocab_size
    if vocab_size is None or e.model.vocab_size is not None:
        return e
    return e.resolved(vocab_size, other.data.labels)


def _without_seed(name: str) -> str:
    return re.sub(r"[-_. ]?(s|seed)[-_=]?\d+$", "", name) or name


def _named(groups: Sequence[tuple[str, list[RunRecord]]]) -> list[Variant]:
    """Variants with unique names: equal ones get the folder of their first run, with as many parents as needed."""
    names = [name for name, _ in groups]
    paths = [(name, records[0].folder.parts) for name, records in groups]
    for depth in range(1, max(len(parts) for _, parts in paths) + 1):
        longer = [f"{name} ({'/'.join(parts[-depth:])})" for name, parts in paths]
        names = [name if names.count(name) == 1 else other for name, other in zip(names, longer, strict=True)]
    return [
        Variant(name, tuple(sorted(records, key=seed_of)), label)
        for name, label, (_, records) in zip(names, short_labels(names), groups, strict=True)
    ]
