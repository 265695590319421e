"""`gptjax train`: from an experiment file to a finished run folder."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gptjax.checks import check
from gptjax.commands import parse, start_jax
from gptjax.config import Experiment
from gptjax.errors import GptjaxError
from gptjax.loading import load_experiment
from gptjax.schema import type_problems

if TYPE_CHECKING:
    from gptjax.training.run import Run


def train(arguments: list[str]) -> None:
    """FILE, options and overrides -> a finished run folder."""
    named = bool(arguments) and not arguments[0].startswith("-")
    loaded = load_experiment(arguments[0]) if named else Experiment()
    if type_problems(loaded):
        check(loaded)

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Train an experiment, or go on with the run that stands in its folder."""

        run_dir: Path | None = None  # folder of the run; None: runs/NAME
        resume: bool = False  # insist that a run stands there to go on with
        allow_changes: bool = False  # go on with other values or data than the run was trained with
        from_step: int | None = None  # go back to this checkpoint (0: begin again); later ones are set aside
        experiment: Annotated[Experiment, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = loaded

    options = parse(Options, arguments[named:], f"train {arguments[0] if named else 'FILE'}")
    if not named:
        raise GptjaxError("no experiment file was given; gptjax train experiments/quickstart.py for instance")
    experiment = check(options.experiment)
    start_jax()
    import jax

    from gptjax.atomic_io import read_text
    from gptjax.interop.open import open_model
    from gptjax.training import train as training
    from gptjax.training.loop import say
    from gptjax.training.run import EXPERIMENT, open_run

    folder = options.run_dir or Path("runs") / experiment.name
    before = open_run(folder).result() if (folder / EXPERIMENT).exists() else None
    figures = training.train(experiment, folder, options.resume, options.allow_changes, options.from_step, open_model)
    from gptjax.lab.report import plot_loss  # only now: SciPy and matplotlib take more than half a second

    run = open_run(folder)
    plot = plot_loss(run) if jax.process_index() == 0 else None
    if experiment.train.sample_tokens and jax.process_count() == 1:
        kept = folder / "samples.txt"  # of a run that was finished before, they stand
        print(read_text(kept).rstrip() if kept.is_file() and figures == before else _final_samples(run), flush=True)
    val = "not finite"
    if figures["val_loss"] is not None:
        val = f"{figures['val_loss']:.4f}"
        if figures.get("val_bits_per_byte") is not None:
            val += f" nats a token, {figures['val_bits_per_byte']:.4f} bits a byte"
        if "val_accuracy" in figures:
            val += f", {figures['val_accuracy']:.1%} right"
    speed = figures["tokens_per_second"]
    each = f", {1e3 * figures['tokens'] / figures['steps'] / speed:.1f} ms a step" if speed else ""
    say(
        f"{folder}: val loss {val}; {figures['steps']:,} steps, {figures['tokens']:,} tokens in "
        f"{figures['seconds']:.0f} s{each}, at most {figures['memory_bytes'] / 1e9:.2f} GB of memory"
        + (f"; loss curve in {plot}" if plot else "")
    )


def _final_samples(run: "Run") -> str:
    """Two continuations of the sample prompt, also kept in RUN/samples.txt."""
    from gptjax.inference.generator import Generator
    from gptjax.inference.sampling import SamplingParams
    from gptjax.interop.open import open_model

    t = run.experiment.train
    writer = Generator(open_model(str(run.folder)))
    room = run.experiment.model.context_length - len(writer.encode(t.sample_prompt))
    texts = writer.texts(t.sample_prompt, min(t.sample_tokens, room), 2, SamplingParams(0.8), run.experiment.seed)
    text = "\n".join(f"--- sample {i} ---\n{text}" for i, text in enumerate(texts, 1))
    (run.folder / "samples.txt").write_text(text + "\n", encoding="utf-8")
    return text
