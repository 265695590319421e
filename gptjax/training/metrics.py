"""Metrics of a run: metrics.jsonl, trackers and the progress line."""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from gptjax.atomic_io import open_plain, write_atomic
from gptjax.config import Experiment
from gptjax.errors import GptjaxError, RunError, TrainingFailed
from gptjax.training.hardware import memory_bytes

MAX_LINE = 1 << 20  # bytes of a line of metrics.jsonl


class MetricsLog:
    """Appends to metrics.jsonl and to the trackers of the experiment."""

    def __init__(self, folder: Path, experiment: Experiment, resume_step: int):
        """Drops the lines after `resume_step`, whose steps will be repeated."""
        self._trackers: list[Any] = []
        if jax.process_index() != 0:
            self._file = open(os.devnull, "a")  # noqa: SIM115 - one process writes for all
            return
        path = folder / "metrics.jsonl"
        kept = [line for line, values in read_metrics(path) if values["step"] <= resume_step]
        write_atomic(path, "".join(kept))
        self._file = path.open("a")
        self._trackers = [TRACKERS[name](folder, experiment) for name in experiment.train.trackers]

    def write(self, step: int, **metrics: float) -> None:
        """Writes one line, also to the trackers."""
        self._append(step, metrics)
        for tracker in self._trackers:
            tracker.write(step, metrics)

    def event(self, step: int, name: str, **details: Any) -> None:
        """Writes one line about an unusual event."""
        self._append(step, {"event": name} | details)

    def sync(self) -> None:
        """Waits until everything so far is on disk: a checkpoint must not survive without the lines before it."""
        with self._reporting():
            if self._file.name != os.devnull:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._reporting():
            self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _append(self, step: int, values: dict[str, Any]) -> None:
        with self._reporting():
            self._file.write(json.dumps({"step": step} | values) + "\n")
            self._file.flush()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise TrainingFailed(
                f"{self._file.name}: cannot be written ({e.strerror}); the checkpoints are intact. Free some space or "
                "repair the disk; the same command resumes from the last of them"
            ) from e


def read_metrics(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a metrics.jsonl, as text and parsed. An unfinished last line is left out; no file gives no lines.

    Raises `RunError` naming a damaged line.
    """
    if not path.exists():
        return
    with open_plain(path) as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE).decode(errors="replace")
            if not line.endswith("\n") and len(line) < MAX_LINE:
                return
            try:
                if not line.endswith("\n"):
                    raise ValueError(f"it has more than {MAX_LINE:,} bytes")
                values = json.loads(line)
                if not isinstance(values["step"], int):
                    raise ValueError("its step is not an integer")
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise RunError(
                    f"{path}, line {number}: is damaged ({e}); remove that line to continue without it"
                ) from None
            yield line, values


class TensorBoard:
    """Event files under RUN/tensorboard."""

    def __init__(self, folder: Path, experiment: Experiment):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise GptjaxError(
                "train.trackers = 'tensorboard': needs tensorboardX; pip install 'gptjax[track]'"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run; offline if WANDB_MODE says so."""

    def __init__(self, folder: Path, experiment: Experiment):
        try:
            import wandb
        except ImportError:
            raise GptjaxError("train.trackers = 'wandb': needs wandb; pip install 'gptjax[track]'") from None
        config = json.loads(experiment.to_json())
        self._run = wandb.init(project="gptjax", name=experiment.name, dir=str(folder), config=config, resume="allow")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB}


class Progress:
    """The progress line: redrawn on a terminal, else printed every `seconds`."""

    def __init__(self, total: int, initial: int, loss_unit: str = "", seconds: float = 10.0):
        self.shows = jax.process_index() == 0
        self.bar = tqdm(total=total, initial=initial, bar_format="{desc}", disable=not sys.stderr.isatty())
        self.loss_unit = f" {loss_unit}" if loss_unit else ""
        self.total, self.seconds, self.last = total, seconds, 0.0

    def show(self, step: int, metrics: dict[str, float], always: bool = False) -> None:
        """`metrics`: loss, tokens_per_second, steps_per_second, mfu, seconds_left; once evaluated val_loss, val_step,
        val_accuracy."""
        val = f" | val {metrics['val_loss']:.4f}" if metrics.get("val_loss") is not None else ""
        val += f" (accuracy {metrics['val_accuracy']:.1%})" if metrics.get("val_accuracy") is not None else ""
        val += f" at {metrics['val_step']}" if val and metrics["val_step"] != step else ""
        left = int(metrics["seconds_left"])
        line = (
            f"step {step:>{len(str(self.total))}}/{self.total} | loss {metrics['loss']:.4f}{self.loss_unit}{val}"
            f" | {metrics['tokens_per_second']:,.0f} tokens/s | {1e3 / metrics['steps_per_second']:.1f} ms/step"
            f" | MFU {metrics['mfu']:.1%}"
            f" | {left // 60}:{left % 60:02d} left | {memory_bytes() / 1e9:.1f} GB"
        )
        if not self.shows:
            return
        if not self.bar.disable:
            self.bar.set_description_str(line)
        elif always or time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()
