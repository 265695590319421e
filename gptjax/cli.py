"""The command line: one verb, one short function. What is slow to import is imported by the verb that needs it."""

import dataclasses
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from gptjax import __version__
from gptjax.errors import EXIT_BUG, EXIT_FAILED, EXIT_INTERRUPTED, GptjaxError, RunError

if TYPE_CHECKING:
    from gptjax.training.run import Run

HELP = f"""gptjax {__version__}: train GPTs from experiment files, and use them

  gptjax train FILE [--run-dir DIR] [--section.field VALUE ...]    train, or go on with, an experiment
  gptjax sample MODEL PROMPT [--max-length N] [...]                continue a text; MODEL: a run, a Hugging Face folder or name
  gptjax chat MODEL                                                talk with a model in the terminal
  gptjax eval MODEL [--data FILE ...] [--tasks TASK ...] [...]     loss on its validation text or another; lm-eval tasks
  gptjax verify RUN                                                compare every checksum of every checkpoint
  gptjax replay RUN --step N                                       make a step again, and look for NaN and Inf in it

  gptjax VERB --help       all options of a verb; gptjax train FILE --help lists every field with its value

exit codes: 0 done, 1 a bug (with a traceback), 2 bad input or a damaged file, 3 training had to stop,
            75 interrupted with the state saved (the same command goes on), 130 interrupted before that
"""


def main() -> None:
    """The `gptjax` command."""
    verb, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if verb in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if verb in ("-V", "--version"):
        print(__version__)
        return
    if verb not in VERBS:
        _stop(f"gptjax: no such verb: {verb!r}; there are {', '.join(VERBS)} (gptjax --help)", 2)
    try:
        VERBS[verb](arguments)
    except GptjaxError as e:
        _stop(f"gptjax {verb}: {e}", e.exit_code)
    except KeyboardInterrupt:
        print(f"gptjax {verb}: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # at once: threads that still save are not waited for
    except BrokenPipeError:  # the reader of our output went away: nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception:
        if not _is_one_of_several():
            raise
        _stop(traceback.format_exc(), EXIT_BUG)


def _stop(message: str, code: int) -> None:
    print(message, file=sys.stderr, flush=True)
    if code == EXIT_FAILED or (_is_one_of_several() and code != EXIT_INTERRUPTED):
        sys.stdout.flush()
        os._exit(code)  # at once: on the usual way out jax waits for the other processes, which may be gone
    sys.exit(code)


def _is_one_of_several() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def _parse(kind: Any, arguments: list[str], usage: str) -> Any:
    import tyro

    return tyro.cli(kind, args=arguments, prog=f"gptjax {usage}", config=(tyro.conf.AvoidSubcommands,))


def _start_jax() -> None:
    """Quiet libraries, a cache of compiled programs, and the other processes of a cluster job."""
    for name in ("absl", "asyncio"):  # of a save that fails Orbax logs hundreds of lines; gptjax says it in one
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisablehook
    from gptjax import sharding
    from gptjax.training.workshop import enable_compilation_cache

    enable_compilation_cache()
    sharding.join_cluster()


def _unraisablehook(what: "sys.UnraisableHookArgs") -> None:
    """Python's own, but for what TensorStore reports once for every array when a save was given up."""
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def train(arguments: list[str]) -> None:
    """FILE, options and overrides -> a finished run folder."""
    import tyro

    from gptjax.checks import check
    from gptjax.config import Experiment
    from gptjax.loading import load_experiment
    from gptjax.schema import type_problems

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

    options = _parse(Options, arguments[named:], f"train {arguments[0] if named else 'FILE'}")
    if not named:
        raise GptjaxError("no experiment file was given; gptjax train experiments/quickstart.py for instance")
    experiment = check(options.experiment)
    _start_jax()
    import jax

    from gptjax.lab.report import plot_loss
    from gptjax.training import train as training
    from gptjax.training.loop import say
    from gptjax.training.run import open_run

    folder = options.run_dir or Path("runs") / experiment.name
    figures = training.train(experiment, folder, options.resume, options.allow_changes, options.from_step)
    run = open_run(folder)
    plot = plot_loss(run) if jax.process_index() == 0 else None
    if experiment.train.sample_tokens and jax.process_count() == 1:
        print(_final_samples(run), flush=True)
    val = "not finite"
    if figures["val_loss"] is not None:
        val = f"{figures['val_loss']:.4f} nats a token, {figures['val_bits_per_byte']:.4f} bits a byte"
    say(
        f"{folder}: val loss {val}; {figures['steps']:,} steps, {figures['tokens']:,} tokens in "
        f"{figures['seconds']:.0f} s" + (f"; loss curve in {plot}" if plot else "")
    )


def _final_samples(run: "Run") -> str:
    """Two continuations of the sample prompt, also kept in RUN/samples.txt."""
    from gptjax.inference.rules import Sampling
    from gptjax.inference.writer import Writer
    from gptjax.interop.open import open_model

    t = run.experiment.train
    writer = Writer(open_model(str(run.folder)))
    room = run.experiment.model.context_length - len(writer.encode(t.sample_prompt))
    texts = writer.texts(t.sample_prompt, min(t.sample_tokens, room), 2, Sampling(0.8), run.experiment.seed)
    text = "\n".join(f"--- sample {i} ---\n{text}" for i, text in enumerate(texts, 1))
    (run.folder / "samples.txt").write_text(text + "\n", encoding="utf-8")
    return text


def sample(arguments: list[str]) -> None:
    """MODEL and a prompt -> continuations on stdout."""
    from gptjax.verbs.write import sample

    sample(arguments)


def chat(arguments: list[str]) -> None:
    """MODEL -> a dialogue on the terminal."""
    from gptjax.verbs.write import chat

    chat(arguments)


def evaluate(arguments: list[str]) -> None:
    """MODEL -> its loss on its own text or another, or its results in tasks."""
    from gptjax.verbs.evaluate import evaluate

    evaluate(arguments)


def verify(arguments: list[str]) -> None:
    """RUN -> one line for each checkpoint: whole, or what is wrong with it."""
    from tyro.conf import Positional

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Compare every file of every checkpoint with its checksum. Reads only; no device is used."""

        run: Positional[Path]  # a run folder

    options: Options = _parse(Options, arguments, "verify")
    from gptjax.training import checkpoint
    from gptjax.training.run import open_run

    run = open_run(options.run)
    run.metrics()
    run.tokenizer()
    damaged, found = 0, checkpoint.listing(run.checkpoints)
    for c in found:
        why = checkpoint.problem(c)
        if why and not c.folder.exists():
            continue  # removed by the run itself while we looked
        damaged += why is not None
        size = sum(size for size, _ in c.files.values())
        loss = "" if c.val_loss is None else f", val loss {c.val_loss:.4f}"
        print(
            f"step {c.step:>8,}  "
            + (f"DAMAGED  {why}" if why else f"whole    {len(c.files)} files, {size:,} bytes{loss}")
        )
    for path, why in checkpoint.unfinished(run.checkpoints):
        print(f"not a checkpoint: {path}: {why}")
    if damaged or not found:
        raise RunError(f"{run.folder}: {damaged} of {len(found)} checkpoints are damaged" if found else
                       f"{run.folder}: has no checkpoint")  # fmt: skip


def replay(arguments: list[str]) -> None:
    """RUN and a step -> the step made again, and where its numbers are not finite."""
    from tyro.conf import Positional

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Make a step of a run again from the checkpoint before it; name the first module without finite numbers."""

        run: Positional[Path]  # a run folder
        step: int  # counted as in metrics.jsonl: 1 is the first update

    options: Options = _parse(Options, arguments, "replay")
    from gptjax.training.run import open_run

    run = open_run(options.run)
    _start_jax()
    from gptjax.training.diagnosis import replay as make_again

    print("\n".join(make_again(run, options.step)))


VERBS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "sample": sample,
    "chat": chat,
    "eval": evaluate,
    "verify": verify,
    "replay": replay,
}
