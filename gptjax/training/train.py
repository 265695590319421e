"""From an experiment to a finished run folder: who may write it, what stands there already, where to go on."""

import contextlib
import time
from pathlib import Path

import jax

from gptjax import sharding
from gptjax.checks import check
from gptjax.config import Experiment
from gptjax.errors import Interrupted, RunError, TrainingFailed
from gptjax.training import checkpoint
from gptjax.training.evaluation import Figures
from gptjax.training.initial import ModelLoader
from gptjax.training.lock import Lock, hold
from gptjax.training.loop import Trainer, say
from gptjax.training.run import (
    EXPERIMENT,
    Changes,
    Run,
    accept_changes,
    check_folder,
    check_room,
    lines,
    open_run,
    set_aside_later,
    start_run,
)
from gptjax.training.train_setup import TrainSetup, build_train_setup, check_start, first_state, summary
from gptjax.training.watchdog import Watchdog


def train(
    experiment: Experiment,
    folder: Path,
    resume: bool = False,
    allow_changes: bool = False,
    from_step: int | None = None,
    open_init: ModelLoader | None = None,
) -> Figures:
    """Trains an experiment in a run folder, or goes on with the run that stands there; returns its final figures.

    `resume` insists that a run stands there; `allow_changes` goes on with other values than those it was trained with;
    `from_step` takes it back to that checkpoint (0: to the beginning) and sets aside what came after;
    `open_init` opens the model that `experiment.init` names, which else must be a run folder. Raises
    `GptjaxError`s, each with what to do; `Interrupted` after the first Ctrl-C or SIGTERM, with the state saved.
    """
    began = time.perf_counter()
    check(experiment, sharding.num_devices())
    if resume or from_step is not None:
        open_run(folder)
    locks: list[Lock] = []
    with contextlib.ExitStack() as held:
        sharding.on_first_process(lambda: check_folder(folder))
        sharding.on_first_process(lambda: locks.append(held.enter_context(hold(folder))))
        watchdog = Watchdog(folder, experiment.train.watchdog_seconds, locks[0].touch if locks else None)
        failure: BaseException | None = None
        try:
            run = open_run(folder) if (folder / EXPERIMENT).exists() else None
            setup = build_train_setup(experiment, run=run, open_init=open_init)
            return _train(setup, folder, watchdog, began, allow_changes, from_step)
        except jax.errors.JaxRuntimeError as e:
            failure = e
            if jax.process_count() == 1:
                raise
            raise TrainingFailed(f"{watchdog.doing}: {str(e).splitlines()[0]}; {watchdog.explain()}") from e
        except Interrupted as e:
            raise Interrupted(f"{e}{' (without --rollback-to)' if from_step is not None else ''}") from None
        except BaseException as e:
            failure = e
            raise
        finally:
            watchdog.close(failure)


def _train(
    setup: TrainSetup, folder: Path, watchdog: Watchdog, began: float, allow_changes: bool, from_step: int | None
) -> Figures:
    run, first = Run(folder, setup.experiment), sharding.on_first_process
    fresh = from_step == 0 or first(lambda: not checkpoint.listing(run.checkpoints))
    finished, reference = first(run.result) is not None, setup.objective.reference
    check_start(setup, fresh, finished)

    def claim() -> Changes:
        if run.result() is None:
            check_room(folder, checkpoint.state_bytes(setup.abstract))
        beside = reference.fingerprint if reference and not finished else None
        init = setup.start.open if setup.start else None
        return start_run(folder, setup.experiment, setup.store, allow_changes, init, beside)

    changes = first(claim)
    figures = first(run.result)
    if figures and not changes and from_step is None:
        say(f"{folder}: finished already; nothing to do")
        return figures
    watchdog.heartbeat("looking for a checkpoint")
    step = first(lambda: (c := checkpoint.choose_to_go_on(run.checkpoints, from_step)) and c.step)
    chosen = next((c for c in checkpoint.listing(run.checkpoints) if c.step == step), None)
    first(lambda: _check_choice(run, step, from_step))
    if step is not None and chosen is None:
        raise RunError(f"{folder}: is not the same folder for all processes; put it on a disk that they share")
    if chosen and chosen.position is None and changes:
        raise RunError(f"{chosen.folder}: is of format 1 and does not say where it stands in the data; go on without "
                       "changes until the next checkpoint, then make them")  # fmt: skip
    with jax.set_mesh(setup.mesh):
        state = first_state(setup, chosen)
        setup.batches.seek((chosen and chosen.position) or setup.batches.position(int(state.step)))
        position = setup.batches.position(int(state.step))
        if changes or from_step is not None:  # only now, when nothing can be refused any more, is anything moved
            first(lambda: set_aside_later(run, position.step))
            first(lambda: checkpoint.set_aside_after(run.checkpoints, position.step))
        if changes:
            first(lambda: accept_changes(run, setup.experiment, setup.store, changes, position))
            say("\n".join([f"{folder}: goes on from step {position.step}, {position.samples:,} examples and {position.tokens:,} "
                           "tokens, with changes:", *lines(changes)]))  # fmt: skip
        say(summary(setup, position.step))
        return Trainer(setup, run, position.step, began, watchdog).run(state)


def _check_choice(run: Run, step: int | None, from_step: int | None) -> None:
    """Raises `RunError` where the run would be over already, or would begin again although it had come far."""
    t = run.experiment.train
    if step is not None and step > t.steps:
        raise RunError(
            f"{run.folder}: stands at step {step} already; train.steps must be more, or go back by --rollback-to"
        )
    logged = max((line["step"] for line in run.metrics()), default=0)
    if step is None and from_step is None and 0 < 2 * t.checkpoint_every < logged:
        raise RunError(
            f"{run.checkpoints}: holds no checkpoint, and the run has logged step {logged} already; bring the folder "
            "back from a copy, or begin again with --rollback-to 0"
        )
