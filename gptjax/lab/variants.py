"""Which runs belong together: those that differ in their seed alone are one variant."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptjax.config import Experiment
from gptjax.errors import RunError
from gptjax.lab.records import Record, look, look_at_trial
from gptjax.lab.trials import SWEEP, read_sweep
from gptjax.training.run import EXPERIMENT


@dataclass(frozen=True)
class Variant:
    """Runs that differ in their seed alone."""

    name: str
    records: tuple[Record, ...]  # by seed, one each

    @property
    def experiment(self) -> Experiment | None:
        """What is trained, resolved where any of its runs began."""
        known = [r.experiment for r in self.records if r.experiment is not None]
        return next((e for e in known if e.model.vocab_size is not None), known[0] if known else None)

    @property
    def finished(self) -> tuple[Record, ...]:
        return tuple(r for r in self.records if r.state == "finished")

    def by_seed(self, metric: str) -> dict[int, float]:
        """The figure of each finished run that has it."""
        return {seed_of(r): r.figures[metric] for r in self.finished if metric in r.figures}


def seed_of(record: Record) -> int:
    assert record.experiment is not None, "a run without a seed belongs to no variant"
    return record.experiment.seed


def variants_of(folders: Iterable[Path]) -> tuple[list[Variant], list[str]]:
    """The variants in runs and sweeps, in their order, and what had to be left out of them.

    Those of a sweep are as it says; of other runs, and of several sweeps, those whose experiments differ only in name
    and seed are one. Raises `RunError` for a folder that is neither, and where nothing is left.
    """
    groups: list[tuple[str, list[Record]]] = []
    left_out: list[str] = []
    for folder in dict.fromkeys(path.resolve() for path in folders):
        own: dict[str, list[Record]] = {}  # of this sweep
        for label, record in _records(folder, left_out):
            same = own.get(label) or next((records for _, records in groups if _are_alike(record, records)), None)
            if same is None:
                groups.append((label or _without_seed(record.experiment.name if record.experiment else record.name),
                               same := []))  # fmt: skip
            if label:
                own[label] = same
            if any(seed_of(r) == seed_of(record) for r in same):
                left_out.append(f"{record.name}: its seed {seed_of(record)} is there twice; the first run counts")
            else:
                same.append(record)
    if not groups:
        raise RunError("nothing to report: " + ("; ".join(left_out) or "no run was named"))
    return _named(groups), left_out


def _records(folder: Path, left_out: list[str]) -> list[tuple[str, Record]]:
    """What a folder named by the user holds, each with its variant where a sweep names it."""
    if (folder / SWEEP).is_file():
        try:
            return [(trial.variant, _of_trial(look_at_trial(trial), trial.seed)) for trial in read_sweep(folder)]
        except (LookupError, TypeError, AttributeError) as e:
            raise RunError(f"{folder / SWEEP}: is damaged ({type(e).__name__}: {e})") from None
    if not (folder / EXPERIMENT).is_file():
        why = "is neither a run nor a sweep" if folder.exists() else "does not exist"
        raise RunError(f"{folder}: {why}; gptjax runs FOLDER lists what there is in a folder")
    record = look(folder)
    if record.experiment is None:
        left_out.append(f"{record.name}: {record.why}")
        return []
    return [("", record)]


def _of_trial(record: Record, seed: int) -> Record:
    """Raises where a trial's folder holds a run of another seed: pairs would be wrong."""
    if record.experiment is not None and record.experiment.seed != seed:
        told = f"{record.folder}: holds a run with seed {record.experiment.seed}, and sweep.json says {seed}"
        raise RunError(f"{told}; move the run elsewhere, and run the sweep again")
    return record


def _are_alike(record: Record, records: Sequence[Record]) -> bool:
    a, b = record.experiment, records[0].experiment
    if a is None or b is None:
        return False
    a, b = _as_begun(a, b), _as_begun(b, a)
    return a == replace(b, name=a.name, seed=a.seed)


def _as_begun(e: Experiment, other: Experiment) -> Experiment:
    """An experiment that has not begun with the tokens that another has found."""
    found = other.model.vocab_size
    return e if found is None or e.model.vocab_size is not None else e.resolved(found, other.data.labels)


def _without_seed(name: str) -> str:
    return re.sub(r"[-_. ]?(s|seed)[-_=]?\d+$", "", name) or name


def _named(groups: Sequence[tuple[str, list[Record]]]) -> list[Variant]:
    """With names that differ: the same one is followed by the folder of its first run, as far up as it takes."""
    names = [name for name, _ in groups]
    places = [(name, records[0].folder.parts) for name, records in groups]
    for up in range(1, max(len(parts) for _, parts in places) + 1):
        longer = [f"{name} ({'/'.join(parts[-up:])})" for name, parts in places]
        names = [name if names.count(name) == 1 else other for name, other in zip(names, longer, strict=True)]
    return [Variant(name, tuple(sorted(records, key=seed_of)))
            for name, (_, records) in zip(names, groups, strict=True)]  # fmt: skip
