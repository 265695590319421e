"""Training from an experiment to a finished run folder: update, evaluate, save, and say how it goes."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import sharding
from gptjax.checks import check
from gptjax.config import Experiment
from gptjax.data.batches import prefetch
from gptjax.data.store import find_store
from gptjax.errors import Interrupted, TrainingFailed
from gptjax.training import checkpoint
from gptjax.training.metrics import MetricsLog, Progress, flops_per_token, memory_bytes, num_params, peak_flops
from gptjax.training.optim import make_schedule
from gptjax.training.run import Run, check_data, check_folder, open_run, start_run
from gptjax.training.state import TrainState
from gptjax.training.step import Metrics
from gptjax.training.workshop import Workshop, check_start, first_state, one_device, prepare, summary

Figures = dict[str, Any]


def say(text: str) -> None:
    """Tells the user, on stderr, from one process only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def train(experiment: Experiment, folder: Path, resume: bool = False) -> Figures:
    """Trains an experiment in a run folder, or goes on with the run that stands there; returns its final figures.

    `resume` insists that a run stands there. Raises `GptjaxError`s, each with what to do; `Interrupted` after the first
    Ctrl-C or SIGTERM, with the state saved.
    """
    began = time.perf_counter()
    check(experiment, jax.device_count())
    if resume:
        open_run(folder)
    if jax.process_index() == 0:
        check_folder(folder)
    shop = prepare(experiment)
    check_start(shop)
    run = start_run(folder, shop.experiment, shop.store)
    if figures := run.result():
        say(f"{folder}: finished already; nothing to do")
        return figures
    with jax.set_mesh(shop.mesh):
        state = first_state(shop, run)
        say(summary(shop, int(state.step)))
        return Fit(shop, run, int(state.step), began).run(state)


def evaluate(shop: Workshop, state: TrainState) -> Figures:
    """Loss over the whole validation text: nats a token, and bits a byte, which do not depend on the tokenizer.

    Bits a byte count the bytes of the tokens that are asked for; `end_of_text` has none, its cost is spread over them.
    """
    piece_bytes = np.zeros(shop.experiment.model.vocab_size or 0)
    piece_bytes[: shop.store.tokenizer.vocab_size] = [len(piece) for piece in shop.store.tokenizer.pieces]
    nats, answers, num_bytes = [], [], 0.0
    for batch in shop.batches.validation():
        num_bytes += float((piece_bytes[batch.targets] * batch.weights).sum())
        total, count = shop.eval_step(state, sharding.place(batch, ("batch", "length"), shop.mesh))
        nats.append(total)
        answers.append(count)
    total_nats, total_answers = (float(np.sum(np.array(jax.device_get(x), np.float64))) for x in (nats, answers))
    return {
        "val_loss": total_nats / total_answers,
        "val_bits_per_byte": total_nats / math.log(2) / max(num_bytes, 1.0),
        "val_tokens": int(total_answers),
        "val_bytes": int(num_bytes),
    }


def evaluate_run(run: Run, which: str = "last") -> Figures:
    """`evaluate` for a checkpoint of a run folder, on one device; with the step and size of the model."""
    store = find_store(run.provenance()["data"], run.experiment.data)
    shop = prepare(run.experiment, one_device(), store)
    check_data(run, shop.store)
    chosen = checkpoint.choose(run.checkpoints, which)
    with jax.set_mesh(shop.mesh):
        state = checkpoint.restore(chosen, shop.abstract)
        began = time.perf_counter()
        figures = evaluate(shop, state)
    seconds = time.perf_counter() - began
    tokens = chosen.step * shop.batches.tokens_per_step
    return figures | {
        "steps": chosen.step,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": figures["val_tokens"] / seconds,
        "num_params": num_params(shop.experiment.model)["total"],
    }


@contextmanager
def stop_requests() -> Iterator[Callable[[], str | None]]:
    """Notes the first SIGINT or SIGTERM, which the yielded function then names; a second SIGINT stops at once."""
    asked: list[str] = []

    def note(number: int, frame: Any) -> None:
        asked.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopwatch:
    """Seconds spent in steps: not in evaluation, saving or compiling."""

    def __init__(self, seconds: float):
        self.seconds = seconds  # over the whole run, earlier processes included
        self.mark: float | None = None  # when the steps since the last pause began
        self.rate = math.nan  # steps a second between the last two pauses
        self.steps = 0

    def start(self, step: int) -> None:
        self.mark, self.steps = time.perf_counter(), step

    def pause(self, step: int) -> None:
        if self.mark is not None:
            passed = time.perf_counter() - self.mark
            self.seconds += passed
            self.rate = (step - self.steps) / passed
        self.mark = None


class Fit:
    """The loop: what changes from step to step besides the state."""

    def __init__(self, shop: Workshop, run: Run, first: int, began: float):
        t = shop.experiment.train
        self.shop, self.folder, self.first, self.began = shop, run, first, began
        self.log = MetricsLog(run.folder, shop.experiment, first)
        earlier = [line for line in run.metrics() if line["step"] <= first]
        self.latest: Figures = {name: value for line in earlier for name, value in line.items()}
        self.best = min((line["val_loss"] for line in earlier if "val_loss" in line), default=math.inf)
        self.watch = Stopwatch(self.latest.get("seconds", 0.0))
        self.progress = Progress(t.steps, first)
        self.rate = make_schedule(shop.experiment.optim, t.steps)
        self.peak, self.peak_source = peak_flops()
        self.waited = 0.0  # seconds that steps waited for their batch
        self.writer = checkpoint.Writer(run.checkpoints, t.keep_last, t.keep_best)

    def run(self, state: TrainState) -> Figures:
        """From a state to the finished run and its figures."""
        try:
            with stop_requests() as asked_to_stop:
                self._steps(state, asked_to_stop)
        finally:
            self.progress.close()
            self.log.close()
            self.writer.close()
        figures = self._result()
        if jax.process_index() == 0:
            self.folder.write_result(figures)
        return figures

    def _steps(self, state: TrainState, asked_to_stop: Callable[[], str | None]) -> None:
        t = self.shop.experiment.train
        make = partial(self.shop.batches.on_devices, mesh=self.shop.mesh)
        batches = prefetch(make, range(self.first, t.steps), t.prefetch)
        for step in range(self.first + 1, t.steps + 1):
            began = time.perf_counter()
            batch = next(batches)
            if step > self.first + 1:  # as the stopwatch, which leaves the first step out
                self.waited += time.perf_counter() - began
            state, metrics = self.shop.train_step(state, batch)
            stopping = asked_to_stop()
            logs, evaluates, saves = (
                step == t.steps or (every > 0 and step % every == 0)
                for every in (t.log_every, t.eval_every, t.checkpoint_every)
            )
            if not (logs or evaluates or saves or stopping or step == self.first + 1):
                continue
            jax.block_until_ready(metrics)
            self.watch.pause(step)
            self._report(step, metrics, logs)
            val_loss = self._evaluate(step, state) if evaluates else None
            if saves or stopping or (val_loss is not None and val_loss == self.best and t.keep_best):
                self.writer.save(state, val_loss)
            if stopping and step < t.steps:
                batches.close()
                self.writer.wait()
                raise Interrupted(f"{stopping}: step {step} is saved; the same command goes on from there")
            self.watch.start(step)

    def _report(self, step: int, metrics: Metrics, logs: bool) -> None:
        loss, grad_norm, answers = (float(metrics[name]) for name in ("loss", "grad_norm", "answers"))
        if not math.isfinite(loss + grad_norm):
            raise TrainingFailed(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; the last checkpoint is good. Lower "
                "optim.learning_rate, warm up for longer, or clip harder (optim.clip_norm)"
            )
        if step == self.first + 1:
            say(f"  first step done {time.perf_counter() - self.began:.1f} s after the start; peak of the machine "
                f"{self.peak / 1e12:.3g} TFLOP/s ({self.peak_source})")  # fmt: skip
        per_step = self.shop.batches.tokens_per_step
        speed = self.watch.rate * per_step
        figures = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": float(self.rate(step - 1)),
            "answers": answers,
        }
        if not math.isnan(speed):
            mfu = speed * flops_per_token(self.shop.experiment.model) / self.peak
            figures |= {"tokens_per_second": speed, "mfu": mfu, "seconds": self.watch.seconds}
        if logs:
            self.log.write(step, **figures)
        self.latest |= figures
        self._show(step)

    def _show(self, step: int, always: bool = False) -> None:
        if not math.isnan(self.watch.rate):
            left = (self.shop.experiment.train.steps - step) / self.watch.rate
            self.progress.show(step, self.latest | {"seconds_left": left}, always)

    def _evaluate(self, step: int, state: TrainState) -> float:
        figures = evaluate(self.shop, state)
        self.latest |= figures
        self.best = min(self.best, figures["val_loss"])
        self.log.write(step, **figures)
        self._show(step, always=True)
        return figures["val_loss"]

    def _result(self) -> Figures:
        e, latest = self.shop.experiment, self.latest
        seconds, per_step = self.watch.seconds, self.shop.batches.tokens_per_step
        speed = (e.train.steps - 1) * per_step / seconds if seconds else 0.0  # the first step compiles: it is not timed
        return {
            "val_loss": latest["val_loss"],
            "val_bits_per_byte": latest["val_bits_per_byte"],
            "val_tokens": latest["val_tokens"],
            "val_bytes": latest["val_bytes"],
            "best_val_loss": self.best,
            "train_loss": latest["loss"],
            "steps": e.train.steps,
            "tokens": e.train.steps * per_step,
            "seconds": seconds,
            "tokens_per_second": speed,
            "mfu": speed * flops_per_token(e.model) / self.peak,
            "peak_flops": self.peak,
            "num_params": num_params(e.model)["total"],
            "data_wait_share": self.waited / max(seconds, 1e-9),
            "data_work_share": self.shop.batches.seconds / max(seconds, 1e-9),
            "memory_bytes": memory_bytes(),
        }
