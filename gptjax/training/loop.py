"""The training loop: update, evaluate, save, log."""

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

from gptjax.data.prefetch import prefetch
from gptjax.errors import Interrupted, TrainingFailed
from gptjax.model.size import flops_per_token, num_params
from gptjax.objectives.losses import Metrics
from gptjax.training import checkpoint
from gptjax.training.diagnosis import diagnose
from gptjax.training.evaluation import ScalarMetrics, evaluate
from gptjax.training.hardware import memory_bytes, peak_flops
from gptjax.training.metrics import MetricsLog, Progress
from gptjax.training.optim import make_schedule, num_trainable, updates_taken
from gptjax.training.run import Run
from gptjax.training.state import TrainState
from gptjax.training.summary import privacy
from gptjax.training.train_setup import TrainSetup
from gptjax.training.watchdog import Watchdog

LAG = 8  # steps after which the metrics of a step are read, so that reading them never waits for the devices
HEALTH = ("recent_loss", "skipped", "skipped_in_row")  # metrics for `_check_health`, not for the log
SPIKE = 10.0  # a loss this many times the recent mean is worth a warning


def log(text: str) -> None:
    """Prints to stderr, from one process only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def stop_requests() -> Iterator[Callable[[int], str | None]]:
    """Records the first SIGINT or SIGTERM; a second SIGINT stops at once.

    The yielded function takes the step just finished, and names the signal that requested to stop after it. With
    several processes, jax agrees on a step that none has finished yet, so all stop after the same step.
    """
    requests: list[str] = []
    alone = jax.process_count() == 1

    def note(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
        requests.append(signal.Signals(number).name)
        if not alone:
            os.kill(os.getpid(), signal.SIGTERM)  # which jax is listening for

    def stop_requested(step: int) -> str | None:
        if alone:
            return requests[0] if requests else None
        return "a stop request" if multihost_utils.reached_preemption_sync_point(step) else None

    numbers = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop_requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopwatch:
    """The seconds spent in steps and the tokens of these steps, without evaluation, saving and compiling."""

    def __init__(self, tokens_per_step: int, seconds: float, tokens: int):
        self.tokens_per_step = tokens_per_step
        self.seconds, self.tokens = seconds, tokens  # over the whole run, earlier processes included
        self.earlier = seconds  # of earlier processes
        self.mark: float | None = None  # start of the steps since the last pause
        self.rate = math.nan  # steps/s between the last two pauses
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
        """`seconds` of this process as a fraction of those that it spent in steps; 0 before the first timed step."""
        own = self.seconds - self.earlier
        return seconds / own if own else 0.0


class Trainer:
    """Runs the training loop; holds what changes from step to step besides the state."""

    def __init__(self, setup: TrainSetup, run: Run, first: int, began: float, watchdog: Watchdog):
        t = setup.experiment.train
        self.setup = setup
        self.run_folder = run
        self.first = first
        self.began = began
        self.watchdog = watchdog
        self.log = MetricsLog(run.folder, setup.experiment, first)
        earlier = [line for line in run.metrics() if line["step"] <= first and "event" not in line]
        self.latest: ScalarMetrics = {name: value for line in earlier for name, value in line.items()}
        comparable = [line for line in earlier if "val_loss" in line and line["step"] > run.last_change_of_text()]
        self.best = min((line["val_loss"] for line in comparable), default=math.inf)
        self.evaluated = max((line["step"] for line in comparable), default=None)  # the last step with a loss
        self.clock = self._stopwatch()
        self.progress = Progress(t.steps, first, "nats/token" if setup.objective.is_token_nll else "")
        self.rate = make_schedule(setup.experiment.optim, t.steps)
        self.peak, self.peak_source = peak_flops()
        self.waited = 0.0  # seconds that steps waited for their batches
        self.skipped = 0  # skipped updates of the whole run
        self.unread: deque[tuple[int, Metrics]] = deque()  # metrics that the devices may not have computed yet
        self.writer = checkpoint.CheckpointWriter(run.checkpoints, t.keep_last, t.keep_best)

    def _stopwatch(self) -> Stopwatch:
        """Continues from the last logged line, whose tokens belong to its seconds; a checkpoint may be later."""
        batches = self.setup.batches
        seconds = self.latest.get("seconds", 0.0)
        before = (
            batches.position(self.first).tokens - batches.tokens_per_step
        )  # for old runs that did not log `timed_tokens`
        return Stopwatch(batches.tokens_per_step, seconds, self.latest.get("timed_tokens", before) if seconds else 0)

    def run(self, state: TrainState) -> ScalarMetrics:
        """Trains from a state to the end; returns the final metrics."""
        self.skipped = int(state.health.skipped)
        try:
            with stop_requests() as stop_requested:
                state = self._steps(state, stop_requested)
                if self.evaluated != int(
                    state.step
                ):  # killed after the last checkpoint, before the metrics were logged
                    self._evaluate(int(state.step), state)
                self._close()
        except KeyboardInterrupt:
            raise  # at once, without waiting for a save in flight, which was not committed
        except BaseException:
            try:
                self._close()
            except TrainingFailed as e:
                log(str(e))  # in addition to the error that is already raised
            raise
        result = self._result()
        if jax.process_index() == 0:
            self.run_folder.write_result(result)
        return result

    def _close(self) -> None:
        self.progress.close()
        try:
            self.writer.close()
        finally:
            self.log.close()

    def _steps(self, state: TrainState, stop_requested: Callable[[int], str | None]) -> TrainState:
        t = self.setup.experiment.train
        make_batch = partial(self.setup.batches.device_batch, mesh=self.setup.mesh)
        with contextlib.closing(prefetch(make_batch, range(self.first, t.steps), t.prefetch)) as batches:
            for step in range(self.first + 1, t.steps + 1):
                self.watchdog.heartbeat(f"step {step}")
                began = time.perf_counter()
                batch = next(batches)
                if step > self.first + 1:  # the stopwatch leaves the first step out as well
                    self.waited += time.perf_counter() - began
                self.writer.check()  # reports a failed save now, not at the next save
                batch, rollout_metrics = self.setup.batch(state, step - 1, batch)
                state, metrics = self.setup.train_step(state, batch)
                self.unread.append((step, metrics))
                stopping = stop_requested(step)
                logs, evaluates, saves = (
                    step == t.steps or (every > 0 and step % every == 0)
                    for every in (t.log_every, t.eval_every, t.checkpoint_every)
                )
                if not (logs or evaluates or saves or stopping or step == self.first + 1):
                    self._check_health(state, LAG)
                    continue
                jax.block_until_ready(metrics)
                self.clock.pause(step)
                self._check_health(state)
                self._report(step, state, metrics, rollout_metrics, logs, shows=not evaluates)
                val_loss = self._evaluate(step, state) if evaluates else None
                if saves or stopping or (val_loss is not None and val_loss == self.best and t.keep_best):
                    self._save(step, state, val_loss)
                if stopping and step < t.steps:
                    self.writer.wait()
                    raise Interrupted(f"{stopping}: step {step} is saved; the same command resumes from there")
                self.clock.start(step)
        return state

    def _check_health(self, state: TrainState, leave: int = 0) -> None:
        """Reads the metrics of all but the last `leave` unread steps, and warns of skipped updates and loss spikes."""
        while len(self.unread) > leave:
            step, metrics = self.unread.popleft()
            m = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self.skipped = int(m["skipped"])
            jumped = m["loss"] > SPIKE * m["recent_loss"]
            if not (m["skipped_in_row"] or jumped):
                continue
            examples = self.setup.batches.example_range(step - 1)
            numbers = " to ".join(map(str, examples)) or "none"
            about = f"loss {m['loss']:.4g}, gradient norm {m['grad_norm']:.4g}, examples {numbers}"
            if m["skipped_in_row"]:
                log(f"warning: step {step} was skipped: {about}")
                self.log.event(step, "skipped", why=about, examples=examples)
            else:
                log(f"warning: step {step}: loss spike: {about}; the recent mean is {m['recent_loss']:.4g}")
                self.log.event(step, "spike", why=about, examples=examples)
            if m["skipped_in_row"] >= self.setup.experiment.train.max_skipped:
                found = diagnose(self.setup, state._replace(step=state.step * 0 + (step - 1)), step - 1)
                raise TrainingFailed(
                    f"step {step}: {m['skipped_in_row']:.0f} consecutive updates were skipped (train.max_skipped), "
                    f"the last with {about}; {found}. The checkpoints are intact. Lower optim.learning_rate, warm up "
                    f"longer or clip harder; gptjax replay {self.run_folder.folder} --step {step} recomputes the step"
                )

    def _save(self, step: int, state: TrainState, val_loss: float | None) -> None:
        self.watchdog.heartbeat(f"the save of step {step}")
        self.log.sync()
        self.writer.save(state, self.setup.batches.position(step), val_loss)

    def _report(
        self, step: int, state: TrainState, metrics: Metrics, rollout_metrics: ScalarMetrics, logs: bool, shows: bool
    ) -> None:
        scalars = {name: float(x) for name, x in metrics.items() if name not in HEALTH} | rollout_metrics
        if step == self.first + 1:
            log(f"  first step after {time.perf_counter() - self.began:.1f} s; peak of the devices "
                f"{self.peak / 1e12:.3g} TFLOP/s ({self.peak_source})")  # fmt: skip
        if not math.isfinite(scalars["loss"] + scalars["grad_norm"]):
            return  # a skipped update, which `_check_health` reports
        speed = self.clock.rate * self.clock.tokens_per_step
        last_update = max(int(updates_taken(state.opt_state)) - 1, 0)
        values = scalars | {"learning_rate": float(self.rate(last_update))}
        if not math.isnan(speed):
            mfu = speed * flops_per_token(self.setup.experiment.model) / self.peak
            timed = {"seconds": self.clock.seconds, "timed_tokens": self.clock.tokens}
            values |= {"tokens_per_second": speed, "mfu": mfu} | timed
        if logs:
            self.log.write(step, **values)
        self.latest |= values
        if shows:
            self._show(step)

    def _show(self, step: int, always: bool = False) -> None:
        if not math.isnan(self.clock.rate) and "loss" in self.latest:
            left = (self.setup.experiment.train.steps - step) / self.clock.rate
            timing = {"seconds_left": left, "steps_per_second": self.clock.rate}
            self.progress.show(step, self.latest | timing | {"val_step": self.evaluated}, always)

    def _evaluate(self, step: int, state: TrainState) -> float | None:
        """The validation loss; None if it is not finite, which does not stop the run."""
        self.evaluated = step
        metrics = evaluate(self.setup, state, lambda: self.watchdog.heartbeat(f"the evaluation after step {step}"))
        if not math.isfinite(metrics["val_loss"]):
            log(f"warning: step {step}: the validation loss is {metrics['val_loss']}")
            self.log.event(step, "validation loss is not finite")
            self.latest |= {name: value if isinstance(value, int) else None for name, value in metrics.items()}
            return None
        self.latest |= metrics
        self.best = min(self.best, metrics["val_loss"])
        self.log.write(step, **metrics)
        self._show(step, always=True)
        return metrics["val_loss"]

    def _result(self) -> ScalarMetrics:
        e = self.setup.experiment
        clock = self.clock
        position = self.setup.batches.position(e.train.steps)
        speed = clock.tokens / clock.seconds if clock.seconds else 0.0
        return {
            **{name: value for name, value in self.latest.items() if name.startswith("val_")},
            "best_val_loss": self.best if math.isfinite(self.best) else None,
            "train_loss": self.latest.get("loss"),
            "steps": e.train.steps,
            "skipped": self.skipped,
            "samples": position.samples,
            "tokens": position.tokens,
            "seconds": clock.seconds,
            "tokens_per_second": speed,
            "mfu": speed * flops_per_token(e.model) / self.peak,
            "peak_flops": self.peak,
            "num_params": num_params(e.model)["total"],
            "num_trained": num_trainable(e),
            "data_wait_share": clock.share(self.waited),
            "data_work_share": clock.share(self.setup.batches.seconds),
            "memory_bytes": memory_bytes(),
            **privacy(self.setup),
        }
