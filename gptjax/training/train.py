"""From an experiment to a finished run folder: the lock, the checkpoint to resume from, changes."""

import contextlib
import time
from pathlib import Path

import jax

from gptjax import sharding
from gptjax.checks import check
from gptjax.config import Experiment
from gptjax.errors import Interrupted, RunError, TrainingFailed
from gptjax.training import checkpoint
from gptjax.training.evaluation import ScalarMetrics
from gptjax.training.initial import ModelLoader
from gptjax.training.lock import Lock, hold
from gptjax.training.loop import Trainer, log
from gptjax.training.preflight import check_start
from gptjax.training.provenance import Changes, accept_changes, format_changes, quarantine_later, start_run
from gptjax.training.run import EXPERIMENT, Run, check_folder, check_room, open_run
from gptjax.training.summary import summary
from gptjax.training.train_setup import TrainSetup, build_train_setup, first_state
from gptjax.training.watchdog import Watchdog


def train(
    experiment: Experiment,
    folder: Path,
    resume: bool = False,
    allow_changes: bool = False,
    rollback_to: int | None = None,
    open_init: ModelLoader | None = None,
) -> ScalarMetrics:
    """Trains an experiment in a run folder, or resumes the run in it; returns the final metrics.

    `resume`: the run must exist; `allow_changes`: resume with other values than those it was trained with;
    `rollback_to`: resume from the checkpoint of that step (0: start again), and quarantine what came after it;
    `open_init`: opens the model that `experiment.init` names, by default a run folder. Raises `GptjaxError`s, each with
    what to do; `Interrupted` after the first Ctrl-C or SIGTERM, with the state saved.
    """
    began = time.perf_counter()
    check(experiment, sharding.num_devices())
    if resume or rollback_to is not None:
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
            return _train(setup, folder, watchdog, began, allow_changes, rollback_to)
        except jax.errors.JaxRuntimeError as e:
            failure = e
            if jax.process_count() == 1:
                raise
            raise TrainingFailed(f"{watchdog.activity}: {str(e).splitlines()[0]}; {watchdog.explain()}") from e
        except Interrupted as e:
            raise Interrupted(f"{e}{' (without --rollback-to)' if rollback_to is not None else ''}") from None
        except BaseException as e:
            failure = e
            raise
        finally:
            watchdog.close(failure)


def _train(
    setup: TrainSetup, folder: Path, watchdog: Watchdog, began: float, allow_changes: bool, rollback_to: int | None
) -> ScalarMetrics:
    run, first = Run(folder, setup.experiment), sharding.on_first_process
    fresh = rollback_to == 0 or first(lambda: not checkpoint.listing(run.checkpoints))
    finished = first(run.result) is not None
    reference = setup.objective.reference
    check_start(setup, fresh, finished)

    def claim() -> Changes:
        if run.result() is None:
            check_room(folder, checkpoint.state_bytes(setup.abstract))
        fingerprint = reference.fingerprint if reference and not finished else None
        init = setup.initial.open if setup.initial else None
        return start_run(folder, setup.experiment, setup.store, allow_changes, init, fingerprint)

    changes = first(claim)
    result = first(run.result)
    if result and not changes and rollback_to is None:
        log(f"{folder}: is already finished; nothing to do")
        return result
    watchdog.heartbeat("looking for a checkpoint")
    step = first(lambda: (c := checkpoint.choose_to_resume(run.checkpoints, rollback_to)) and c.step)
    chosen = next((c for c in checkpoint.listing(run.checkpoints) if c.step == step), None)
    first(lambda: _check_choice(run, step, rollback_to))
    if step is not None and chosen is None:
        raise RunError(f"{folder}: is not the same folder for all processes; put it on a shared disk")
    if chosen and chosen.position is None and changes:
        raise RunError(f"{chosen.folder}: is of format 1 and does not record its position in the data; resume without "
                       "changes until the next checkpoint, then make them")  # fmt: skip
    with jax.set_mesh(setup.mesh):
        state = first_state(setup, chosen)
        setup.batches.seek((chosen and chosen.position) or setup.batches.position(int(state.step)))
        position = setup.batches.position(int(state.step))
        if changes or rollback_to is not None:  # files are moved only when nothing can fail any more
            first(lambda: quarantine_later(run, position.step))
            first(lambda: checkpoint.quarantine_after(run.checkpoints, position.step))
        if changes:
            first(lambda: accept_changes(run, setup.experiment, setup.store, changes, position))
            start = f"step {position.step}, {position.samples:,} examples and {position.tokens:,} tokens"
            log("\n".join([f"{folder}: resumes from {start}, with changes:", *format_changes(changes)]))
        log(summary(setup, position.step))
        return Trainer(setup, run, position.step, began, watchdog).run(state)


def _check_choice(run: Run, step: int | None, rollback_to: int | None) -> None:
    """Raises `RunError` if the run is past its last step, or would start again although it has logged many steps."""
    t = run.experiment.train
    if step is not None and step > t.steps:
        raise RunError(f"{run.folder}: is already at step {step}; raise train.steps, or go back with --rollback-to")
    logged = max((line["step"] for line in run.metrics()), default=0)
    if step is None and rollback_to is None and 0 < 2 * t.checkpoint_every < logged:
        raise RunError(
            f"{run.checkpoints}: holds no checkpoint, but the run has logged step {logged}; restore the folder "
            "from a copy, or start again with --rollback-to 0"
        )
