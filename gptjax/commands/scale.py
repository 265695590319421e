"""`gptjax scale`: the loss of a large run, predicted from small ones before it exists."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from gptjax.commands import parse
from gptjax.errors import EXIT_FAILED, GptjaxError
from gptjax.loading import load_experiment, load_sweep, runs_folder


@dataclass(frozen=True)
class Options:
    """Train the runs of `sweep` in FILE, predict the loss of its `experiment`, train that, and score the prediction.

    The prediction is registered in a file before the large run begins, and never changed. The same command goes on.
    """

    file: Positional[str]  # the study's file, or its dotted name
    seeds: int = 1  # of each small run, counted up from its own
    workers: int | None = None  # small runs at once; None: one for each GPU, or one
    run_dir: Path | None = None  # the study's folder; None: runs/FILE without .py
    list: bool = False  # only show the runs, where each is, and what was predicted
    wait: bool = False  # for the large run, which is trained elsewhere: gptjax train FILE --run-dir FOLDER/large


def scale(arguments: list[str]) -> None:
    """FILE and options -> prediction.json, score.json, scaling.png and all runs."""
    options: Options = parse(Options, arguments, "scale")
    if options.seeds < 1 or (options.workers is not None and options.workers < 1):
        raise GptjaxError("--seeds and --workers: must be 1 or more")
    import jax

    from gptjax.lab import scaling
    from gptjax.lab.live_table import Progress, console, counts, table
    from gptjax.lab.local import Local, gpus
    from gptjax.lab.progress import state_of
    from gptjax.lab.report import plot_scaling
    from gptjax.lab.sweep import FixedPlan, train_missing
    from gptjax.lab.trials import write_sweep

    jax.config.update("jax_platforms", "cpu")  # of this process: the runs are to have the GPUs
    folder = options.run_dir or runs_folder(options.file)
    study = scaling.study_of(load_sweep(options.file), load_experiment(options.file), options.seeds, folder)
    prediction = scaling.registered(study)
    if options.list:
        runs = [*study.trials, study.large]
        states = {trial.name: state_of(trial) for trial in runs}
        console().print(table(runs, states))
        print(f"{folder}: {len(runs)} runs ({counts(states)})")
        print(_told(prediction) if prediction else "nothing is predicted yet")
        return
    if prediction is None:
        write_sweep(folder, study.trials, file=options.file)
        with Progress() as show:
            states = train_missing(FixedPlan(study.trials), Local(options.workers or max(1, len(gpus()))), show)
        if not all(state.done for state in states.values()):
            print(f"{folder}: not all small runs are done ({counts(states)}); nothing is predicted", file=sys.stderr)
            sys.exit(EXIT_FAILED)
        prediction = scaling.register(study)
    print(_told(prediction), flush=True)
    plot_scaling(prediction, None, folder / scaling.PICTURE)
    study.large.file.write_text(study.large.experiment.to_json(), encoding="utf-8")
    if options.wait:
        print(f"waiting for {study.large.folder} (gptjax train {study.large.file} --run-dir {study.large.folder})")
    with Progress() as show:
        states = train_missing(FixedPlan([study.large]), scaling.ExternalRunner() if options.wait else Local(1), show)
    if not states[study.large.name].done:
        sys.exit(EXIT_FAILED)
    scored = scaling.score(study)
    plot_scaling(prediction, scored, folder / scaling.PICTURE)
    print(_result(prediction, scored))


def _told(prediction: Mapping[str, Any]) -> str:
    """What was predicted, in a few lines."""
    large, law, (low, high) = prediction["large"], prediction["law"], prediction["interval"]
    lines = [f"{'FLOPs':>9} {'parameters':>11} {'tokens':>11} {'loss':>8}  run"]
    for run in prediction["runs"]:
        lines.append(
            f"{run['flops']:9.2e} {run['parameters']:11,} {run['tokens']:11,} {run['loss']:8.4f}  {run['name']}"
        )
    lines.append(f"L(C) = {law['a'][0]:.4f} (C / {law['unit'][0]:.3e})^{law['b'][0]:.4f} + {law['c']:.4f}")
    share = f"{prediction['confidence']:.0%}"
    lines.append(f"predicted for {large['name']} ({large['flops']:.2e} FLOPs): {prediction['loss']:.4f} "
                 f"({share}: {low:.4f} to {high:.4f})")  # fmt: skip
    if other := prediction["chinchilla"]:
        low, high = other["interval"]
        lines.append(f"by L(N, D): {other['loss']:.4f} ({share}: {low:.4f} to {high:.4f})")
    lines.append(f"registered {prediction['registered']}, SHA-256 {prediction['sha256']}")
    return "\n".join(lines)


def _result(prediction: Mapping[str, Any], scored: Mapping[str, Any]) -> str:
    """What came out, in a few lines."""
    where = "inside" if scored["inside"] else "outside"
    return (
        f"{prediction['large']['name']}: loss {scored['loss']:.4f}, predicted {scored['predicted']:.4f}: "
        f"{scored['relative_error']:+.2%}, {where} the interval\n"
        f"compute: {scored['times_smallest']:.0f} times that of the smallest run, {scored['times_largest']:.1f} times "
        f"that of the largest\nregistered {scored['registered']}, begun {scored['began']}"
    )
