"""`gptjax verify` and `gptjax replay`: check the files and the steps of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from gptjax.commands import parse, start_jax
from gptjax.errors import RunError, printable


@dataclass(frozen=True)
class Verification:
    """Check every file of every checkpoint against its checksum. Only reads, and uses no device."""

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]  # a run folder


def verify(arguments: list[str]) -> None:
    """RUN -> one line for each checkpoint: ok, or damaged and why."""
    options: Verification = parse(Verification, arguments, "verify")
    from gptjax.training import checkpoint
    from gptjax.training.run import open_run

    run = open_run(options.run)
    run.metrics()
    run.tokenizer()
    damaged = 0
    checkpoints = checkpoint.listing(run.checkpoints)
    for c in checkpoints:
        why = checkpoint.problem(c)
        if why and not c.folder.exists():
            continue  # removed by the run in the meantime
        if why:
            damaged += 1
            print(f"step {c.step:>8,}  DAMAGED  {printable(why)}")
            continue
        size = sum(size for size, _ in c.files.values())
        loss = "" if c.val_loss is None else f", val loss {c.val_loss:.4f}"
        print(f"step {c.step:>8,}  ok       {len(c.files)} files, {size:,} bytes{loss}")
    for path, why in checkpoint.unfinished(run.checkpoints):
        print(printable(f"not a checkpoint: {path}: {why}"))
    if not checkpoints:
        raise RunError(f"{run.folder}: has no checkpoint")
    if damaged:
        raise RunError(f"{run.folder}: {damaged} of {len(checkpoints)} checkpoints cannot be used")


@dataclass(frozen=True)
class Replay:
    """Recompute a step of a run from the checkpoint before it; name the first module with non-finite numbers."""

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]  # a run folder
    step: int  # as in metrics.jsonl: 1 is the first update


def replay(arguments: list[str]) -> None:
    """RUN and a step -> the recomputed step, and where its numbers are not finite."""
    options: Replay = parse(Replay, arguments, "replay")
    from gptjax.interop.open import open_local
    from gptjax.training.run import open_run

    run = open_run(options.run)
    start_jax()
    from gptjax.training.diagnosis import replay as recompute

    print(printable("\n".join(recompute(run, options.step, open_local))))
