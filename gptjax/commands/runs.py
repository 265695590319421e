"""`gptjax verify` and `gptjax replay`: a run folder looked at again."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from gptjax.commands import parse, start_jax
from gptjax.errors import RunError


@dataclass(frozen=True)
class Verification:
    """Compare every file of every checkpoint with its checksum. Reads only; no device is used."""

    run: Positional[Path]  # a run folder


def verify(arguments: list[str]) -> None:
    """RUN -> one line for each checkpoint: whole, or what is wrong with it."""
    options: Verification = parse(Verification, arguments, "verify")
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
    if not found:
        raise RunError(f"{run.folder}: has no checkpoint")
    if damaged:
        raise RunError(f"{run.folder}: of {len(found)} checkpoints {damaged} cannot be used")


@dataclass(frozen=True)
class Replay:
    """Make a step of a run again from the checkpoint before it; name the first module without finite numbers."""

    run: Positional[Path]  # a run folder
    step: int  # counted as in metrics.jsonl: 1 is the first update


def replay(arguments: list[str]) -> None:
    """RUN and a step -> the step made again, and where its numbers are not finite."""
    options: Replay = parse(Replay, arguments, "replay")
    from gptjax.interop.open import open_here
    from gptjax.training.run import open_run

    run = open_run(options.run)
    start_jax()
    from gptjax.training.diagnosis import replay as make_again

    print("\n".join(make_again(run, options.step, open_here)))
