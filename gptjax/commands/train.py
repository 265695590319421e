"""`gptjax train`: from an experiment file to a finished run folder."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gptjax.commands import for_terminal, parse, start_jax
from gptjax.config import Experiment
from gptjax.errors import ConfigError, GptjaxError
from gptjax.loading import load_experiment
from gptjax.schema import type_problems

if TYPE_CHECKING:
    from gptjax.training.run import Run


def train(arguments: list[str]) -> None:
    """FILE, options and overrides -> a finished run folder."""
    has_file = bool(arguments) and not arguments[0].startswith("-")
    loaded = load_experiment(arguments[0]) if has_file else Experiment()
    if problems := type_problems(loaded):
        raise ConfigError(list(problems.values()))

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Train an experiment, or resume the run in its folder."""

        run_dir: Path | None = None  # folder of the run; None: runs/NAME
        resume: bool = False  # fail if there is no run to resume
        allow_changes: bool = False  # resume with other settings or data than the run was trained with
        rollback_to: int | None = (
            None  # roll back to the checkpoint of this step (0: start over); later ones are quarantined
        )
        experiment: Annotated[Experiment, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = loaded

    options = parse(Options, arguments[has_file:], f"train {arguments[0] if has_file else 'FILE'}")
    if not has_file:
        raise GptjaxError("no experiment file was given; for instance gptjax train experiments/quickstart.py")
    from gptjax.checks import check  # only now: objectives import JAX and Flax, which takes more than a second

    experiment = check(options.experiment)
    start_jax()
    import jax

    from gptjax.atomic_io import read_text
    from gptjax.interop.open import open_model
    from gptjax.training import train as training
    from gptjax.training.loop import log
    from gptjax.training.run import EXPERIMENT, open_run

    folder = options.run_dir or Path("runs") / experiment.name
    before = open_run(folder).result() if (folder / EXPERIMENT).exists() else None
    metrics = training.train(experiment, folder, options.resume, options.allow_changes, options.rollback_to, open_model)
    from gptjax.lab.report import plot_loss  # imported late: SciPy and matplotlib take more than half a second

    run = open_run(folder)
    plot = plot_loss(run) if jax.process_index() == 0 else None
    if experiment.train.sample_tokens and jax.process_count() == 1:
        samples = folder / "samples.txt"
        if samples.is_file() and metrics == before:  # the run was already finished
            print(for_terminal(read_text(samples).rstrip()), flush=True)
        else:
            print(for_terminal(_final_samples(run)), flush=True)
    log(_summary(folder, metrics) + (f"; loss curve in {plot}" if plot else ""))


def _summary(folder: Path, metrics: Mapping[str, Any]) -> str:
    """The final metrics in one line."""
    val = "not finite"
    if metrics["val_loss"] is not None:
        val = f"{metrics['val_loss']:.4f}"
        if metrics.get("val_bits_per_byte") is not None:
            val += f" nats/token, {metrics['val_bits_per_byte']:.4f} bits/byte"
        if "val_accuracy" in metrics:
            val += f", accuracy {metrics['val_accuracy']:.1%}"
    speed = ""
    if metrics["tokens_per_second"]:
        ms = 1e3 * metrics["tokens"] / metrics["steps"] / metrics["tokens_per_second"]
        speed = f" ({metrics['tokens_per_second']:,.0f} tokens/s, {ms:.1f} ms/step)"
    return (
        f"{folder}: val loss {val}; {metrics['steps']:,} steps, {metrics['tokens']:,} tokens in "
        f"{metrics['seconds']:.0f} s{speed}; peak memory {metrics['memory_bytes'] / 1e9:.2f} GB"
    )


def _final_samples(run: "Run") -> str:
    """Two continuations of the sample prompt, also kept in RUN/samples.txt."""
    from gptjax.inference.generator import Generator
    from gptjax.inference.sampling import SamplingParams
    from gptjax.interop.open import open_model

    t = run.experiment.train
    generator = Generator(open_model(str(run.folder)))
    max_new_tokens = min(t.sample_tokens, run.experiment.model.context_length - len(generator.encode(t.sample_prompt)))
    texts = generator.texts(t.sample_prompt, max_new_tokens, 2, SamplingParams(0.8), run.experiment.seed)
    text = "\n".join(f"--- sample {i} ---\n{text}" for i, text in enumerate(texts, 1))
    (run.folder / "samples.txt").write_text(text + "\n", encoding="utf-8")
    return text
