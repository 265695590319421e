"""The loop of a run: update, evaluate, save, and say how it goes."""

import contextlib
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
from jax.experimental import multihost_utils

from gptjax.data.batches import prefetch
from gptjax.errors import Interrupted, TrainingFailed
from gptjax.training import checkpoint
from gptjax.training.diagnosis import diagnose
from gptjax.training.evaluation import Figures, evaluate
from gptjax.training.metrics import MetricsLog, Progress, flops_per_token, memory_bytes, num_params, peak_flops
from gptjax.training.optim import make_schedule, num_trained, updates_taken
from gptjax.training.run import Run
from gptjax.training.state import TrainState
from gptjax.training.step import Metrics
from gptjax.training.train_setup import TrainSetup, privacy
from gptjax.training.watchdog import Watchdog

LAG = 8  # steps after which a step is looked at: the devices are never waited for because of it
HEALTH = ("usual_loss", "skipped", "skipped_in_row")  # metrics that `_examine` looks at
SPIKE = 10.0  # times the usual loss, from which on a loss is worth a warning


def say(text: str) -> None:
    """Tells the user, on stderr, from one process only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def stop_requests() -> Iterator[Callable[[int], str | None]]:
    """Notes the first SIGINT or SIGTERM; a second SIGINT stops at once.

    The yielded function takes the step just made and names the signal that asked to stop after it. With several
    processes, jax agrees on a step that none of them has made yet, so that all of them stop after the same one.
    """
    asked: list[str] = []
    alone = jax.process_count() == 1

    def note(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
        asked.append(signal.Signals(number).name)
        if not alone:
            os.kill(os.getpid(), signal.SIGTERM)  # which jax is listening for

    def asked_to_stop(step: int) -> str | None:
        if alone:
            return asked[0] if asked else None
        return "asked to stop" if multihost_utils.reached_preemption_sync_point(step) else None

    numbers = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked_to_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopwatch:
    """Seconds spent in steps, and the tokens of these steps: not in evaluation, saving or compiling."""

    def __init__(self, tokens_per_step: int, seconds: float, tokens: int):
        self.tokens_per_step = tokens_per_step
        self.seconds, self.tokens = seconds, tokens  # over the whole run, earlier processes included
        self.earlier = seconds  # those of the earlier processes
        self.mark: float | None = None  # when the steps since the last pause began
        self.rate = math.nan  # steps a second between the last two pauses
        self.steps = 0

    def start(self, step: int) -> None:
        self.mark, self.steps = time.perf_counter(), step

    def pause(self, step: int) -> None:
        if self.mark is not None:
            passed = time.perf_counter() - self.mark
            self.seconds += passed
            self.tokens += (step - self.steps) * self.tokens_per_step
            self.rate = (step - self.steps) / passed
        self.mark = None

    def share(self, seconds: float) -> float:
        """What part some seconds of this process are of those that it spent in steps; 0 where it has timed none."""
        own = self.seconds - self.earlier
        return seconds / own if own else 0.0


class Trainer:
    """The loop: what changes from step to step besides the state."""

    def __init__(self, setup: TrainSetup, run: Run, first: int, began: float, watchdog: Watchdog):
        t = setup.experiment.train
        self.setup, self.folder, self.first, self.began, self.watchdog = setup, run, first, began, watchdog
        self.log = MetricsLog(run.folder, setup.experiment, first)
        earlier = [line for line in run.metrics() if line["step"] <= first and "event" not in line]
        self.latest: Figures = {name: value for line in earlier for name, value in line.items()}
        comparable = [line for line in earlier if "val_loss" in line and line["step"] > run.last_change_of_text()]
        self.best = min((line["val_loss"] for line in comparable), default=math.inf)
        self.evaluated = max((line["step"] for line in comparable), default=None)  # the last step with a loss
        self.clock = self._stopwatch()
        self.progress = Progress(t.steps, first)
        self.rate = make_schedule(setup.experiment.optim, t.steps)
        self.peak, self.peak_source = peak_flops()
        self.waited = 0.0  # seconds that steps waited for their batch
        self.skipped = 0  # updates not taken, over the whole run
        self.unread: deque[tuple[int, Metrics]] = deque()  # of the last steps, which the devices may not have made yet
        self.writer = checkpoint.CheckpointWriter(run.checkpoints, t.keep_last, t.keep_best)

    def _stopwatch(self) -> Stopwatch:
        """It goes on from the last logged line, whose tokens belong to its seconds: a checkpoint may be later."""
        batches, seconds = self.setup.batches, self.latest.get("seconds", 0.0)
        before = batches.position(self.first).tokens - batches.tokens_per_step  # by runs that did not log `timed_tokens`
        return Stopwatch(batches.tokens_per_step, seconds, self.latest.get("timed_tokens", before) if seconds else 0)

    def run(self, state: TrainState) -> Figures:
        """From a state to the finished run and its figures."""
        self.skipped = int(state.health.skipped)
        try:
            with stop_requests() as asked_to_stop:
                state = self._steps(state, asked_to_stop)
                if self.evaluated != int(state.step):  # killed after the last checkpoint, and the figures were lost
                    self._evaluate(int(state.step), state)
                self._close()
        except KeyboardInterrupt:
            raise  # at once: a save in flight is not waited for, and was not committed
        except BaseException:
            try:
                self._close()
            except TrainingFailed as e:
                say(str(e))  # besides the error that is on its way already
            raise
        figures = self._result()
        if jax.process_index() == 0:
            self.folder.write_result(figures)
        return figures

    def _close(self) -> None:
        self.progress.close()
        try:
            self.writer.close()
        finally:
            self.log.close()

    def _steps(self, state: TrainState, asked_to_stop: Callable[[int], str | None]) -> TrainState:
        t = self.setup.experiment.train
        make = partial(self.setup.batches.device_batch, mesh=self.setup.mesh)
        with contextlib.closing(prefetch(make, range(self.first, t.steps), t.prefetch)) as batches:
            for step in range(self.first + 1, t.steps + 1):
                self.watchdog.heartbeat(f"step {step}")
                began = time.perf_counter()
                batch = next(batches)
                if step > self.first + 1:  # as the stopwatch, which leaves the first step out
                    self.waited += time.perf_counter() - began
                self.writer.check()  # a save that failed is told of now, not at the next one
                batch, written = self.setup.batch(state, step - 1, batch)
                state, metrics = self.setup.train_step(state, batch)
                self.unread.append((step, metrics))
                stopping = asked_to_stop(step)
                logs, evaluates, saves = (
                    step == t.steps or (every > 0 and step % every == 0)
                    for every in (t.log_every, t.eval_every, t.checkpoint_every)
                )
                if not (logs or evaluates or saves or stopping or step == self.first + 1):
                    self._examine(state, LAG)
                    continue
                jax.block_until_ready(metrics)
                self.clock.pause(step)
                self._examine(state)
                self._report(step, state, metrics, written, logs, shows=not evaluates)
                val_loss = self._evaluate(step, state) if evaluates else None
                if saves or stopping or (val_loss is not None and val_loss == self.best and t.keep_best):
                    self._save(step, state, val_loss)
                if stopping and step < t.steps:
                    self.writer.wait()
                    raise Interrupted(f"{stopping}: step {step} is saved; the same command goes on from there")
                self.clock.start(step)
        return state

    def _examine(self, state: TrainState, leave: int = 0) -> None:
        """Looks at the oldest of the unread steps, all but `leave`: was any skipped, did any loss jump?"""
        while len(self.unread) > leave:
            step, metrics = self.unread.popleft()
            m = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self.skipped = int(m["skipped"])
            jumped = m["loss"] > SPIKE * m["usual_loss"]
            if not (m["skipped_in_row"] or jumped):
                continue
            examples = self.setup.batches.example_range(step - 1)
            told = " to ".join(map(str, examples)) or "none"
            about = f"loss {m['loss']:.4g}, gradient norm {m['grad_norm']:.4g}, examples {told}"
            if m["skipped_in_row"]:
                say(f"warning: step {step} is skipped: {about}")
                self.log.event(step, "skipped", why=about, examples=examples)
            else:
                say(f"warning: step {step}: the loss jumped: {about}; it was {m['usual_loss']:.4g} on average")
                self.log.event(step, "spike", why=about, examples=examples)
            if m["skipped_in_row"] >= self.setup.experiment.train.max_skipped:
                found = diagnose(self.setup, state._replace(step=state.step * 0 + (step - 1)), step - 1)
                raise TrainingFailed(
                    f"step {step}: {m['skipped_in_row']:.0f} updates in a row were skipped (train.max_skipped), the "
                    f"last with {about}; {found}. The checkpoints are whole. Lower optim.learning_rate, warm up for "
                    f"longer or clip harder; gptjax replay {self.folder.folder} --step {step} looks at it again"
                )

    def _save(self, step: int, state: TrainState, val_loss: float | None) -> None:
        self.watchdog.heartbeat(f"the save of step {step}")
        self.log.sync()
        self.writer.save(state, self.setup.batches.position(step), val_loss)

    def _report(
        self, step: int, state: TrainState, metrics: Metrics, written: Figures, logs: bool, shows: bool
    ) -> None:
        shown = {name: float(x) for name, x in metrics.items() if name not in HEALTH} | written
        if step == self.first + 1:
            say(f"  first step done {time.perf_counter() - self.began:.1f} s after the start; peak of the machine "
                f"{self.peak / 1e12:.3g} TFLOP/s ({self.peak_source})")  # fmt: skip
        if not math.isfinite(shown["loss"] + shown["grad_norm"]):
            return  # skipped: `_examine` has told of it
        speed = self.clock.rate * self.clock.tokens_per_step
        last = max(int(updates_taken(state.opt_state)) - 1, 0)  # of the updates that were taken
        figures = shown | {"learning_rate": float(self.rate(last))}
        if not math.isnan(speed):
            mfu = speed * flops_per_token(self.setup.experiment.model) / self.peak
            timed = {"seconds": self.clock.seconds, "timed_tokens": self.clock.tokens}
            figures |= {"tokens_per_second": speed, "mfu": mfu} | timed
        if logs:
            self.log.write(step, **figures)
        self.latest |= figures
        if shows:
            self._show(step)

    def _show(self, step: int, always: bool = False) -> None:
        if not math.isnan(self.clock.rate) and "loss" in self.latest:
            left = (self.setup.experiment.train.steps - step) / self.clock.rate
            self.progress.show(step, self.latest | {"seconds_left": left, "val_step": self.evaluated}, always)

    def _evaluate(self, step: int, state: TrainState) -> float | None:
        """The validation loss; None where it is not finite, which is no reason to stop."""
        self.evaluated = step
        figures = evaluate(self.setup, state, lambda: self.watchdog.heartbeat(f"the evaluation after step {step}"))
        if not math.isfinite(figures["val_loss"]):
            say(f"warning: step {step}: the validation loss is {figures['val_loss']}")
            self.log.event(step, "validation loss is not finite")
            self.latest |= {name: value if isinstance(value, int) else None for name, value in figures.items()}
            return None
        self.latest |= figures
        self.best = min(self.best, figures["val_loss"])
        self.log.write(step, **figures)
        self._show(step, always=True)
        return figures["val_loss"]

    def _result(self) -> Figures:
        e, latest, clock = self.setup.experiment, self.latest, self.clock
        position = self.setup.batches.position(e.train.steps)
        speed = clock.tokens / clock.seconds if clock.seconds else 0.0
        return {
            **{name: value for name, value in latest.items() if name.startswith("val_")},
            "best_val_loss": self.best if math.isfinite(self.best) else None,
            "train_loss": latest.get("loss"),
            "steps": e.train.steps,
            "skipped": self.skipped,
            "samples": position.samples,
            "tokens": position.tokens,
            "seconds": clock.seconds,
            "tokens_per_second": speed,
            "mfu": speed * flops_per_token(e.model) / self.peak,
            "peak_flops": self.peak,
            "num_params": num_params(e.model)["total"],
            "num_trained": num_trained(e),
            "data_wait_share": clock.share(self.waited),
            "data_work_share": clock.share(self.setup.batches.seconds),
            "memory_bytes": memory_bytes(),
            **privacy(self.setup),
        }
