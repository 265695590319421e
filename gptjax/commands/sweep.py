"""`gptjax sweep`: train the missing trials of a sweep."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from gptjax.commands import check_unused, parse
from gptjax.errors import EXIT_FAILED, GptjaxError
from gptjax.lab.slurm import Resources, Slurm
from gptjax.loading import load_search, load_sweep, runs_folder

if TYPE_CHECKING:
    from gptjax.lab.sweep import Plan
    from gptjax.lab.trials import Trial


@dataclass(frozen=True)
class Options:
    """Train all unfinished trials of a sweep: every experiment of `sweep` in FILE, with every seed.

    Each trial is a separate process with its own run folder. The same command resumes the sweep.
    """

    file: Annotated[Positional[str], tyro.conf.arg(metavar="FILE")]  # the file of the sweep, or its dotted name
    seeds: int = 1  # seeds of each experiment, counted up from its own seed
    workers: int | None = None  # trials in parallel; None: one for each GPU, or one
    run_dir: Path | None = None  # the sweep's folder; None: runs/FILE without .py
    set: tuple[str, ...] = ()  # section.field=VALUE for all trials; the value is JSON or plain text
    search: Literal["no", "random", "tpe", "halving"] = "no"  # Optuna searches the space of `search` in FILE
    trials: int = 20  # number of trials of a search
    status: bool = False  # only show the state of the trials, and an estimate of the remaining time
    executor: Literal["local", "slurm"] = "local"  # this machine, or jobs on a Slurm cluster
    slurm: Resources = field(default_factory=Resources)  # resources of each trial on the cluster


def sweep(arguments: list[str]) -> None:
    """FILE and options -> the run folders of all trials."""
    options: Options = parse(Options, arguments, "sweep")
    _check(options)
    import jax

    from gptjax.lab.live_table import LiveTable, counts
    from gptjax.lab.local import Local, gpus
    from gptjax.lab.search import SearchPlan
    from gptjax.lab.sweep import FixedPlan, train_missing
    from gptjax.lab.trials import existing_trials, read_sweep, trials_of, write_sweep

    jax.config.update("jax_platforms", "cpu")  # this process leaves the GPUs to the trials
    folder = options.run_dir or runs_folder(options.file)
    changes = _changes(options.set)
    local = options.executor == "local"
    workers = options.workers or (max(1, len(gpus())) if local else options.slurm.parallel)
    search_plan: SearchPlan | None = None
    if options.search != "no":
        search = load_search(options.file)
        search = dataclasses.replace(search, experiment=search.experiment.override(changes))
        if options.status:
            return _print_status(read_sweep(folder), folder, workers)
        search_plan = SearchPlan(search, options.search, options.trials, workers, folder)
        plan: Plan = search_plan
    else:
        trials = trials_of([e.override(changes) for e in load_sweep(options.file)], options.seeds, folder)
        if options.status:
            existing_trials(folder, trials)  # raises if the folder holds another sweep
            return _print_status(trials, folder, workers)
        plan = FixedPlan(trials)
    runner = Local(workers) if local else Slurm(folder, options.slurm)
    if not search_plan:
        write_sweep(folder, trials, file=options.file)
    with LiveTable() as show:
        states = train_missing(plan, runner, show)
    print(f"{folder}: {len(states)} trials ({counts(states)}); gptjax report {folder}", file=sys.stderr)
    if search_plan and (best := search_plan.best()):
        name, value, values = best
        print(f"best: {name} with {search.metric} {value:.4f}: {', '.join(f'{k} = {v}' for k, v in values.items())}")
    if not all(s.done or (search_plan and s.status == "cancelled") for s in states.values()):
        sys.exit(EXIT_FAILED)


def _check(options: Options) -> None:
    """Raises `GptjaxError` for options that are out of range or have no effect."""
    if min(options.seeds, options.trials, 1 if options.workers is None else options.workers) < 1:
        raise GptjaxError("--seeds, --trials and --workers: must be at least 1")
    options.slurm.check()
    unused: dict[str, list[str]] = {}
    if options.executor == "local":
        unused["no effect without --executor slurm"] = [f.name for f in dataclasses.fields(Resources)]
    else:
        unused["no effect with --executor slurm (use --slurm.parallel)"] = ["workers"]
    if options.search == "no":
        unused["no effect without --search"] = ["trials"]
    else:
        unused["no effect with --search, whose trials all have the seed of the experiment"] = ["seeds"]
    check_unused(options, unused)


def _print_status(trials: "Sequence[Trial]", folder: Path, workers: int) -> None:
    """Prints the state of the trials, and an estimate of the remaining time."""
    from gptjax.lab.live_table import console, counts, duration, table
    from gptjax.lab.local import gpus
    from gptjax.lab.progress import flops, seconds_needed, state_of
    from gptjax.training.hardware import peak_flops

    states = {trial.name: state_of(trial) for trial in trials}
    left = seconds_needed(trials, states, None if gpus() else peak_flops()[0])
    console().print(table(trials, states, left))
    seconds = max(max(left.values(), default=0), sum(left.values()) / workers)
    remaining = f"about {duration(seconds)} left" if left else "time left unknown until one trial is done"
    cost = sum(flops(trial.experiment) for trial in trials)
    print(f"{folder}: {len(trials)} trials ({counts(states)}) of {cost:.2g} FLOPs in total; {remaining}")


def _changes(given: tuple[str, ...]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for text in given:
        path, equals, value = text.partition("=")
        if not equals:
            raise GptjaxError(f"--set {text}: must be section.field=VALUE, for instance train.steps=100")
        try:
            changes[path] = json.loads(value)
        except ValueError:
            changes[path] = value
    return changes
