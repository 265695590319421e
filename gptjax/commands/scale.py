"""`gptjax scale`: predict the loss of a large run from small runs, before it starts."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from gptjax.commands import parse
from gptjax.errors import EXIT_FAILED, GptjaxError
from gptjax.loading import load_experiment, load_sweep, runs_folder


@dataclass(frozen=True)
class Options:
    """Train the runs of `sweep` in FILE, predict the loss of its `experiment`, train that, and score the prediction.

    The prediction is registered in a file before the large run starts, and never changed. The same command resumes.
    """

    file: Annotated[Positional[str], tyro.conf.arg(metavar="FILE")]  # the study's file, or its dotted name
    seeds: int = 1  # seeds of each small run, counted up from its own seed
    workers: int | None = None  # small runs in parallel; None: one for each GPU, or one
    run_dir: Path | None = None  # the study's folder; None: runs/FILE without .py
    status: bool = False  # only show the state of the runs, and the prediction
    external: bool = (
        False  # wait for the large run, which is trained elsewhere: gptjax train FILE --run-dir FOLDER/large
    )


def scale(arguments: list[str]) -> None:
    """FILE and options -> prediction.json, score.json, scaling.png and all runs."""
    options: Options = parse(Options, arguments, "scale")
    if options.seeds < 1 or (options.workers is not None and options.workers < 1):
        raise GptjaxError("--seeds and --workers: must be at least 1")
    import jax

    from gptjax.lab import scaling
    from gptjax.lab.live_table import LiveTable, console, counts, table
    from gptjax.lab.local import Local, gpus
    from gptjax.lab.progress import state_of
    from gptjax.lab.report import plot_scaling
    from gptjax.lab.sweep import FixedPlan, train_missing
    from gptjax.lab.trials import write_sweep

    jax.config.update("jax_platforms", "cpu")  # this process leaves the GPUs to the runs
    folder = options.run_dir or runs_folder(options.file)
    study = scaling.study_of(load_sweep(options.file), load_experiment(options.file), options.seeds, folder)
    prediction = scaling.read_prediction(study)
    if options.status:
        runs = [*study.trials, study.large]
        states = {trial.name: state_of(trial) for trial in runs}
        console().print(table(runs, states))
        print(f"{folder}: {len(runs)} runs ({counts(states)})")
        print(_prediction_text(prediction) if prediction else "no prediction yet")
        return
    if prediction is None:
        write_sweep(folder, study.trials, file=options.file)
        with LiveTable() as show:
            states = train_missing(FixedPlan(study.trials), Local(options.workers or max(1, len(gpus()))), show)
        if not all(state.done for state in states.values()):
            print(
                f"{folder}: not all small runs are finished ({counts(states)}), so there is no prediction",
                file=sys.stderr,
            )
            sys.exit(EXIT_FAILED)
        prediction = scaling.register(study)
    print(_prediction_text(prediction), flush=True)
    plot_scaling(prediction, None, folder / scaling.PICTURE)
    study.large.file.write_text(study.large.experiment.to_json(), encoding="utf-8")
    if options.external:
        print(f"waiting for {study.large.folder} (gptjax train {study.large.file} --run-dir {study.large.folder})")
    runner = scaling.ExternalRunner() if options.external else Local(1)
    with LiveTable() as show:
        states = train_missing(FixedPlan([study.large]), runner, show)
    if not states[study.large.name].done:
        sys.exit(EXIT_FAILED)
    scored = scaling.score(study)
    plot_scaling(prediction, scored, folder / scaling.PICTURE)
    print(_score_text(prediction, scored))


def _prediction_text(prediction: Mapping[str, Any]) -> str:
    """The small runs, the fitted law and the prediction."""
    large = prediction["large"]
    law = prediction["law"]
    low, high = prediction["interval"]
    lines = [f"{'FLOPs':>9} {'parameters':>11} {'tokens':>11} {'loss':>8}  run"]
    for run in prediction["runs"]:
        lines.append(
            f"{run['flops']:9.2e} {run['parameters']:11,} {run['tokens']:11,} {run['loss']:8.4f}  {run['name']}"
        )
    lines.append(f"L(C) = {law['a'][0]:.4f} (C / {law['unit'][0]:.3e})^{law['b'][0]:.4f} + {law['c']:.4f}")
    share = f"{prediction['confidence']:.0%}"
    lines.append(f"predicted for {large['name']} ({large['flops']:.2e} FLOPs): {prediction['loss']:.4f} nats/token "
                 f"({share}: {low:.4f} to {high:.4f})")  # fmt: skip
    if other := prediction["chinchilla"]:
        low, high = other["interval"]
        lines.append(f"by L(N, D): {other['loss']:.4f} nats/token ({share}: {low:.4f} to {high:.4f})")
    lines.append(f"registered {prediction['registered']}, SHA-256 {prediction['sha256']}")
    return "\n".join(lines)


def _score_text(prediction: Mapping[str, Any], scored: Mapping[str, Any]) -> str:
    """The loss of the large run, compared with the prediction."""
    where = "inside" if scored["inside"] else "outside"
    return (
        f"{prediction['large']['name']}: loss {scored['loss']:.4f} nats/token, predicted {scored['predicted']:.4f}: "
        f"{scored['relative_error']:+.2%}, {where} the interval\n"
        f"compute: {scored['times_smallest']:.0f} times that of the smallest small run, {scored['times_largest']:.1f} "
        f"times that of the largest\nregistered {scored['registered']}, started {scored['began']}"
    )
