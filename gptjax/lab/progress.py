"""How far the trials of a sweep are: read from what stands in its folder, so that any process can tell."""

import contextlib
import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from gptjax.atomic_io import read_json, write_atomic
from gptjax.config import Experiment
from gptjax.errors import EXIT_INTERRUPTED
from gptjax.lab.trials import Trial
from gptjax.sharding import BYTES_A_WEIGHT, largest_divisor
from gptjax.training import lock
from gptjax.training.metrics import flops_per_token, num_params
from gptjax.training.run import METRICS, RESULT

FORMAT_VERSION = 1
LOOKED_AT = 1 << 16  # bytes at the end of metrics.jsonl
LAST_LINES = 8  # of what a trial printed, where it failed
PROCESS_BYTES = 600e6  # of Python, JAX and the compiler, before the first weight
SHARE = 0.3  # of the machine's peak that small models reach, where no trial has shown what it takes
STOPPED = (0, EXIT_INTERRUPTED, -signal.SIGTERM, -signal.SIGINT)  # exit codes of a trial that may go on where it was
Status = Literal["done", "running", "waiting", "stopped", "failed", "cancelled", "new"]


@dataclass(frozen=True)
class State:
    """Where a trial is."""

    status: Status
    step: int = 0  # the last that it told of
    loss: float | None = None  # of training, there
    val_loss: float | None = None  # the last
    tokens_per_second: float | None = None  # the last, of a trial under way
    why: str = ""  # it failed, or who runs it
    seconds: float | None = None  # that it took, once it is done
    memory_bytes: int | None = None  # most that it used

    @property
    def over(self) -> bool:
        """Whether nobody is working on it or about to."""
        return self.status not in ("running", "waiting")

    @property
    def done(self) -> bool:
        return self.status == "done"


def note(trial: Trial, event: str, **details: Any) -> None:
    """Keeps what happened to a trial last."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_atomic(trial.note, json.dumps({"format": FORMAT_VERSION, "event": event, "when": now} | details) + "\n")


def note_end(trial: Trial, code: int, **details: Any) -> None:
    """Keeps how a trial ended, unless it is known why it was stopped."""
    if noted(trial).get("event") != "cancelled":
        note(trial, "ended", code=code, **details)


def noted(trial: Trial) -> dict[str, Any]:
    """What happened to a trial last; empty where nothing has."""
    return read_json(trial.note) if trial.note.exists() else {}


def state_of(trial: Trial, ours: bool = False) -> State:
    """Where a trial is, by its folder, lock and note; `ours`: a job of this process, which is not over."""
    result = trial.folder / RESULT
    if result.exists() and not ours:
        r = read_json(result)
        whole = max(r.get("seconds") or 0.0, noted(trial).get("seconds") or 0.0)  # with the start of the process
        return State("done", r["steps"], val_loss=r.get("val_loss"), seconds=whole, memory_bytes=r.get("memory_bytes"))
    told = _told(trial.folder)
    who, last = lock.holder(trial.folder), noted(trial)
    if ours or who:
        queued = last.get("event") == "submitted" and not who
        return State("waiting" if queued else "running", why="" if ours or not who else who, **told)
    if last.get("event") == "cancelled":
        return State("cancelled", why=last["why"], **told)
    if last.get("event") == "ended" and last["code"] not in STOPPED:
        return State("failed", why=last.get("why") or _ending(last["code"]), **told)
    return State("stopped" if trial.folder.exists() else "new", **told)


def _ending(code: int) -> str:
    """How a process that failed ended."""
    if code > 0:
        return f"exit code {code}"
    told = f"ended by signal {-code} ({signal.strsignal(-code)})"
    return f"{told}, perhaps for want of memory" if code == -signal.SIGKILL else told


def _told(folder: Path) -> dict[str, Any]:
    """What a run's metrics.jsonl says last of its step, its training and validation loss and its speed."""
    told: dict[str, Any] = {}
    try:
        with (folder / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOOKED_AT))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return told
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # cut off, or being written
            values = json.loads(line)
            told |= {"step": values["step"]}
            told |= {name: values[name] for name in ("loss", "val_loss", "tokens_per_second") if name in values}
    return told


def last_lines(trial: Trial) -> list[str]:
    """The end of what a trial printed."""
    text = trial.log.read_text(errors="replace") if trial.log.exists() else ""
    return [line for line in text.splitlines() if line.strip()][-LAST_LINES:]


def flops(e: Experiment) -> float:
    """What training an experiment takes."""
    return flops_per_token(sized(e).model) * tokens(e)


def tokens(e: Experiment) -> int:
    """How many an experiment reads in training."""
    return e.train.steps * e.train.batch_size * e.model.context_length


def sized(e: Experiment) -> Experiment:
    """An experiment with a size for every axis: as many tokens as its tokenizer will have, as far as is known."""
    d = e.data
    pieces = d.tokenizer_vocab_size if d.tokenizer == "sentencepiece" else 257 if d.tokenizer == "byte" else 128
    return e.resolved(pieces, d.labels)


def memory_needed(e: Experiment, cores: int = 1) -> float:
    """Bytes that training takes, roughly: weights, gradients and two moments, what the backward pass keeps, logits.

    Each of the cores that divide the batch has weights of its own.
    """
    m, microbatch = sized(e).model, e.train.batch_size / e.train.microbatches
    kept = m.num_layers * (16 * m.embed_dim + 2 * (m.ffn_dim or 0) + 2 * m.num_heads * m.context_length)
    each = 4 * (kept + 3 * (m.vocab_size or 0)) * m.context_length
    if e.optim.noise_multiplier is not None:
        each += 8 * num_params(m)["total"]  # a window's own gradient, and what is clipped of it
    copies = BYTES_A_WEIGHT * num_params(m)["total"] * largest_divisor(e.train.batch_size // e.train.microbatches, cores)
    return PROCESS_BYTES + copies + each * microbatch


def seconds_needed(trials: Sequence[Trial], states: Mapping[str, State], peak: float | None) -> dict[str, float]:
    """What each trial still takes: at its own speed where it is under way, else by FLOPs, at the speed of others.

    Of those that are done; where none is, of those under way; else at a share of the machine's peak in FLOP/s. Empty
    where nothing of this is known.
    """
    costs = {t.name: flops(t.experiment) for t in trials}
    done = [(costs[t.name], s.seconds) for t in trials if (s := states[t.name]).done and s.seconds]
    speeds = {t.name: costs[t.name] / tokens(t.experiment) * s.tokens_per_second
              for t in trials if (s := states[t.name]).tokens_per_second}  # fmt: skip
    if not done and not speeds and peak is None:
        return {}
    if done:
        usual = sum(cost for cost, _ in done) / sum(seconds for _, seconds in done)
    else:
        usual = fmean(speeds.values()) if speeds else SHARE * (peak or 0)
    left = {t.name: 0.0 if (s := states[t.name]).done else 1 - s.step / t.experiment.train.steps for t in trials}
    return {name: costs[name] * share / speeds.get(name, usual) for name, share in left.items()}
