"""A sweep trains variants of an experiment with several seeds. A trial is one variant with one seed.

sweep.json          the variants in their order, and the trials; the first variant is the baseline
TRIAL.json          the experiment of a trial; `gptjax train TRIAL.json --run-dir TRIAL` trains it as well
TRIAL/              its run folder
TRIAL.log           its output
TRIAL.note.json     the last event: submitted, started, ended or cancelled; see progress.py
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
MAX_VARIANT_NAME = 200  # bytes: a trial adds the seed and a suffix


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    variant: str  # the name of its experiment without the seed: trials that differ only in seed share it
    seed: int
    experiment: Experiment  # not resolved; its name is the trial's
    folder: Path  # the run folder

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
        """The file with its last event."""
        return self.folder.with_name(f"{self.name}.note.json")

    @property
    def command(self) -> list[str]:
        """The command that trains or resumes it."""
        return [sys.executable, "-m", "gptjax", "train", str(self.file), "--run-dir", str(self.folder)]


def trials_of(variants: Sequence[Experiment], seeds: int, folder: Path) -> list[Trial]:
    """Every variant with every seed, all variants of a seed before the next; seeds count up from each variant's own.

    Raises `ConfigError` with all problems of all variants; two that differ only in name are one.
    """
    if problems := _variant_problems(variants):
        raise ConfigError(problems)
    trials = []
    for i in range(seeds):
        for e in variants:
            name = f"{e.name}-seed{e.seed + i}"
            trials.append(Trial(e.name, e.seed + i, e.override(name=name, seed=e.seed + i), folder / name))
    by_content: dict[str, list[str]] = {}
    for trial in trials:
        by_content.setdefault(trial.experiment.override(name="").to_json(), []).append(trial.name)
    if twice := [" and ".join(names) for names in by_content.values() if len(names) > 1]:
        problem = "are the same experiment, because the variants' own seeds are closer than the number of seeds"
        raise ConfigError([f"{names}: {problem}; take fewer seeds, or vary another field" for names in twice])
    return trials


def _variant_problems(variants: Sequence[Experiment]) -> list[str]:
    problems = []
    for i, a in enumerate(variants):
        for b in variants[:i]:
            if not diff(a, dataclasses.replace(b, name=a.name)):
                both = f"{b.name} and {a.name}: are the same experiment"
                if a.name == b.name:
                    both = f"{a.name}: is given twice"
                problems.append(f"{both}; remove one of them")
            elif a.name == b.name:
                fields = ", ".join(diff(a, b))
                problems.append(f"{a.name}: two variants have this name and differ in {fields}; rename one of them")
        name = a.name if len(a.name) <= 60 else f"{a.name[:40]}..."
        if (size := len(a.name.encode(errors="surrogatepass"))) > MAX_VARIANT_NAME:
            problems.append(f"{name}: {size} bytes are too many for a folder name; at most {MAX_VARIANT_NAME}")
            continue
        try:
            check(a)
        except ConfigError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
    return problems


def existing_trials(folder: Path, trials: Sequence[Trial]) -> dict[str, Trial]:
    """The trials that a sweep's folder already has, by name.

    Raises `RunError` if one has the name of one of `trials` but another experiment.
    """
    before = {trial.name: trial for trial in read_sweep(folder)} if (folder / SWEEP).exists() else {}
    for trial in trials:
        old_trial = before.get(trial.name)
        if old_trial and (changes := diff(old_trial.experiment, trial.experiment)):
            fields = "; ".join(f"{path}: {old!r} there, {new!r} now" for path, (old, new) in changes.items())
            raise RunError(f"{folder}: holds another sweep ({trial.name}: {fields}); choose another --run-dir")
    return before


def write_sweep(folder: Path, trials: Sequence[Trial], **more: Any) -> None:
    """Writes a sweep's trials into its folder. Existing trials stay, so that seeds and variants can be added.

    Raises `RunError` as `existing_trials` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with directory_lock(folder):
        merged = existing_trials(folder, trials) | {trial.name: trial for trial in trials}
        for trial in trials:
            write_atomic(trial.file, trial.experiment.to_json())
        listed = [{"name": t.name, "variant": t.variant, "seed": t.seed} for t in merged.values()]
        content = {"format": FORMAT_VERSION} | more | {"trials": listed}
        write_atomic(folder / SWEEP, json.dumps(content, indent=2) + "\n")


def read_sweep(folder: Path) -> list[Trial]:
    """The trials of a sweep's folder. Raises `RunError` if it is not a sweep."""
    path = folder / SWEEP
    if not path.is_file():
        raise RunError(f"{folder}: has no {SWEEP}, so no sweep has started there; gptjax sweep FILE starts one")
    values = read_json(path)
    if values.get("format") != FORMAT_VERSION:
        raise RunError(f"{path}: format is {values.get('format')}; this gptjax reads {FORMAT_VERSION}")
    if strange := [t["name"] for t in values["trials"] if Path(t["name"]).name != t["name"]]:
        raise RunError(f"{path}: {strange[0]!r} is not the name of a folder in it")
    return [
        Trial(t["variant"], t["seed"], load_experiment(str(folder / f"{t['name']}.json")), folder / t["name"])
        for t in values["trials"]
    ]
