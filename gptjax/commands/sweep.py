"""`gptjax sweep`: every trial of a sweep, trained where it is missing."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from gptjax.commands import check_belongs, parse
from gptjax.errors import EXIT_FAILED, GptjaxError
from gptjax.lab.slurm import Resources, Slurm
from gptjax.loading import load_search, load_sweep, runs_folder

if TYPE_CHECKING:
    from gptjax.lab.sweep import Plan
    from gptjax.lab.trials import Trial


@dataclass(frozen=True)
class Options:
    """Train all trials of a sweep that are not done: every experiment of `sweep` in FILE, with every seed.

    Each is a process of its own with a run folder of its own in the sweep's. The same command goes on.
    """

    file: Positional[str]  # the sweep's file, or its dotted name
    seeds: int = 1  # of each experiment, counted up from its own
    workers: int | None = None  # trials at once; None: one for each GPU, or one
    run_dir: Path | None = None  # the sweep's folder; None: runs/FILE without .py
    set: tuple[str, ...] = ()  # section.field=VALUE for all trials, the value as in JSON or plain text
    search: Literal["no", "random", "tpe", "halving"] = "no"  # Optuna looks for the best values of `search` in FILE
    trials: int = 20  # that a search makes
    list: bool = False  # only show the trials, where each is, and what is to be expected of the rest
    on: Literal["local", "slurm"] = "local"  # this machine, or jobs of a cluster
    slurm: Resources = field(default_factory=Resources)  # what each trial asks the cluster for


def sweep(arguments: list[str]) -> None:
    """FILE and options -> the run folders of all trials."""
    options: Options = parse(Options, arguments, "sweep")
    _check(options)
    import jax

    from gptjax.lab.live_table import Progress, counts
    from gptjax.lab.local import Local, gpus
    from gptjax.lab.search import SearchPlan
    from gptjax.lab.sweep import FixedPlan, train_missing
    from gptjax.lab.trials import read_sweep, trials_of, trials_there, write_sweep

    jax.config.update("jax_platforms", "cpu")  # of this process: the trials are to have the GPUs
    folder = options.run_dir or runs_folder(options.file)
    changes, here = _changes(options.set), options.on == "local"
    workers = options.workers or (max(1, len(gpus())) if here else options.slurm.parallel)
    searched: SearchPlan | None = None
    if options.search != "no":
        search = load_search(options.file)
        search = dataclasses.replace(search, experiment=search.experiment.override(changes))
        if options.list:
            return _list(read_sweep(folder), folder, workers)
        plan: Plan = (searched := SearchPlan(search, options.search, options.trials, workers, folder))
    else:
        trials = trials_of([e.override(changes) for e in load_sweep(options.file)], options.seeds, folder)
        if options.list:
            trials_there(folder, trials)  # refused where they are others
            return _list(trials, folder, workers)
        plan = FixedPlan(trials)
    runner = Local(workers) if here else Slurm(folder, options.slurm)
    if not searched:
        write_sweep(folder, trials, file=options.file)
    with Progress() as show:
        states = train_missing(plan, runner, show)
    print(f"{folder}: {len(states)} trials ({counts(states)}); gptjax report {folder}", file=sys.stderr)
    if searched and (best := searched.best()):
        name, figure, values = best
        print(f"best: {name} with {search.metric} {figure:.4f}: {', '.join(f'{k} = {v}' for k, v in values.items())}")
    if not all(s.done or (searched and s.status == "cancelled") for s in states.values()):
        sys.exit(EXIT_FAILED)


def _check(options: Options) -> None:
    """Raises `GptjaxError` for options that are out of range or have no place."""
    if min(options.seeds, options.trials, 1 if options.workers is None else options.workers) < 1:
        raise GptjaxError("--seeds, --trials and --workers: must be 1 or more")
    options.slurm.check()
    idle: dict[str, list[str]] = {}
    if options.on == "local":
        idle["no effect without --on slurm"] = [f.name for f in dataclasses.fields(Resources)]
    else:
        idle["no effect with --on slurm (--slurm.parallel says how many run at once)"] = ["workers"]
    if options.search == "no":
        idle["no effect without --search"] = ["trials"]
    else:
        idle["no effect with --search, whose trials have the seed of its experiment"] = ["seeds"]
    check_belongs(options, idle)


def _list(trials: "Sequence[Trial]", folder: Path, workers: int) -> None:
    """Prints the trials, where each is, and what is to be expected of the rest."""
    from gptjax.lab.live_table import console, counts, duration, table
    from gptjax.lab.local import gpus
    from gptjax.lab.progress import flops, seconds_needed, state_of
    from gptjax.training.metrics import peak_flops

    states = {trial.name: state_of(trial) for trial in trials}
    left = seconds_needed(trials, states, None if gpus() else peak_flops()[0])
    console().print(table(trials, states, left))
    seconds = max(max(left.values(), default=0), sum(left.values()) / workers)
    to_go = f"about {duration(seconds)} to go" if left else "time unknown until one is done"
    cost = sum(flops(trial.experiment) for trial in trials)
    print(f"{folder}: {len(trials)} trials ({counts(states)}) of {cost:.2g} FLOPs in all; {to_go}")


def _changes(given: tuple[str, ...]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for text in given:
        path, equals, value = text.partition("=")
        if not equals:
            raise GptjaxError(f"--set {text}: needs section.field=VALUE, train.steps=100 for instance")
        try:
            changes[path] = json.loads(value)
        except ValueError:
            changes[path] = value
    return changes
