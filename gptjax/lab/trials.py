"""A sweep is variants of an experiment, each trained with several seeds: a trial is one variant with one seed.

sweep.json          the variants in their order, and the trials; the first variant is what the others are compared with
TRIAL.json          the experiment of a trial, which `gptjax train TRIAL.json --run-dir TRIAL` trains as well
TRIAL/              its run folder
TRIAL.log           what it printed
TRIAL.note.json     what happened to it last: started, ended, submitted or cancelled; see progress.py
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.atomic_io import directory_lock, read_json, write_atomic
from gptjax.checks import check
from gptjax.config import Experiment, diff
from gptjax.errors import ConfigError, RunError
from gptjax.loading import load_experiment

FORMAT_VERSION = 1
SWEEP = "sweep.json"
LONGEST_NAME = 200  # letters: file systems allow 255, and seed and ending come behind


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    variant: str  # the name of its experiment before the seed was added: what trials share that differ in seeds only
    seed: int
    experiment: Experiment  # not resolved; its name is that of the trial
    folder: Path  # of the run

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def file(self) -> Path:
        """The experiment as JSON."""
        return self.folder.with_name(f"{self.name}.json")

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.name}.log")

    @property
    def note(self) -> Path:
        """What happened to it last."""
        return self.folder.with_name(f"{self.name}.note.json")

    @property
    def command(self) -> list[str]:
        """Trains it, or goes on with it."""
        return [sys.executable, "-m", "gptjax", "train", str(self.file), "--run-dir", str(self.folder)]


def trials_of(variants: Sequence[Experiment], seeds: int, folder: Path) -> list[Trial]:
    """Every variant with every seed, all variants of a seed before the next; seeds count up from each variant's own.

    Raises `ConfigError` with all that is wrong with any of them, and where two are equal but for their names.
    """
    problems = []
    for i, a in enumerate(variants):
        for b in variants[:i]:
            if not diff(a, dataclasses.replace(b, name=a.name)):
                both = (
                    f"{a.name}: is there twice"
                    if a.name == b.name
                    else f"{b.name} and {a.name}: are the same experiment"
                )
                problems.append(f"{both}; leave one of them out")
            elif a.name == b.name:
                fields = ", ".join(diff(a, b))
                problems.append(f"{a.name}: is the name of two variants that differ in {fields}; name each by its own")
        if len(a.name) > LONGEST_NAME:
            problems.append(
                f"{a.name[:40]}...: a name of {len(a.name)} letters is too long for a folder; give it another"
            )
        try:
            check(a)
        except ConfigError as error:
            problems += [f"{a.name}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    made = []
    for i in range(seeds):
        for e in variants:
            name = f"{e.name}-seed{e.seed + i}"
            made.append(Trial(e.name, e.seed + i, e.override(name=name, seed=e.seed + i), folder / name))
    by_content: dict[str, list[str]] = {}
    for trial in made:
        by_content.setdefault(trial.experiment.override(name="").to_json(), []).append(trial.name)
    if twice := [" and ".join(names) for names in by_content.values() if len(names) > 1]:
        told = "are the same experiment: variants whose own seeds lie closer than the number of seeds"
        raise ConfigError([f"{names}: {told}; take fewer seeds, or vary something else" for names in twice])
    return made


def trials_there(folder: Path, trials: Sequence[Trial]) -> dict[str, Trial]:
    """The trials that a sweep's folder holds already, by name.

    Raises `RunError` where one of the same name as one of `trials` is another experiment.
    """
    before = {trial.name: trial for trial in read_sweep(folder)} if (folder / SWEEP).exists() else {}
    for trial in trials:
        there = before.get(trial.name)
        if there and (changes := diff(there.experiment, trial.experiment)):
            told = "; ".join(f"{path}: {old!r} there, {new!r} now" for path, (old, new) in changes.items())
            raise RunError(f"{folder}: holds another sweep ({trial.name}: {told}); choose another --run-dir")
    return before


def write_sweep(folder: Path, trials: Sequence[Trial], **more: Any) -> None:
    """Keeps a sweep's trials in its folder; those that stand there stay, so that seeds and variants can be added.

    Raises `RunError` as `trials_there` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with directory_lock(folder):
        merged = trials_there(folder, trials) | {trial.name: trial for trial in trials}
        for trial in trials:
            write_atomic(trial.file, trial.experiment.to_json())
        listed = [{"name": t.name, "variant": t.variant, "seed": t.seed} for t in merged.values()]
        content = {"format": FORMAT_VERSION} | more | {"trials": listed}
        write_atomic(folder / SWEEP, json.dumps(content, indent=2) + "\n")


def read_sweep(folder: Path) -> list[Trial]:
    """The trials of a sweep's folder. Raises `RunError` where there is none."""
    path = folder / SWEEP
    if not path.is_file():
        raise RunError(f"{folder}: holds no {SWEEP}, so no trial of a sweep has begun there; gptjax sweep makes it")
    values = read_json(path)
    if values.get("format") != FORMAT_VERSION:
        raise RunError(f"{path}: format is {values.get('format')}; this gptjax reads {FORMAT_VERSION}")
    if strange := [t["name"] for t in values["trials"] if Path(t["name"]).name != t["name"]]:
        raise RunError(f"{path}: {strange[0]!r} is no name of a folder in it")
    return [
        Trial(t["variant"], t["seed"], load_experiment(str(folder / f"{t['name']}.json")), folder / t["name"])
        for t in values["trials"]
    ]
