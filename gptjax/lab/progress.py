"""The progress of a sweep's trials, read from its folder, so that any process can show it."""

import contextlib
import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from gptjax.atomic_io import read_json, read_tail, write_atomic
from gptjax.config import Experiment
from gptjax.errors import EXIT_INTERRUPTED
from gptjax.lab.trials import Trial
from gptjax.model.size import flops_per_token, num_params
from gptjax.sharding import BYTES_PER_WEIGHT, largest_divisor
from gptjax.training import lock
from gptjax.training.run import METRICS, RESULT

FORMAT_VERSION = 1
TAIL_BYTES = 1 << 16  # read from the end of metrics.jsonl
LAST_LINES = 8  # shown of a failed trial's log
PROCESS_BYTES = 600e6  # for Python, JAX and the compiler, before the first weight
ASSUMED_MFU = 0.3  # of small models, if no trial has shown its speed
STOPPED = (0, EXIT_INTERRUPTED, -signal.SIGTERM, -signal.SIGINT)  # exit codes of a trial that can be resumed
Status = Literal["done", "running", "waiting", "stopped", "failed", "cancelled", "new"]


@dataclass(frozen=True)
class TrialState:
    """The progress of a trial."""

    status: Status
    step: int = 0  # the last one in metrics.jsonl
    loss: float | None = None  # training loss at that step
    val_loss: float | None = None  # the last one
    tokens_per_second: float | None = None  # the last one, of an unfinished trial
    why: str = ""  # why it failed, or which process runs it
    seconds: float | None = None  # total time of a finished trial
    memory_bytes: int | None = None  # peak memory of a finished trial

    @property
    def over(self) -> bool:
        """Whether no process runs it and no job is queued."""
        return self.status not in ("running", "waiting")

    @property
    def done(self) -> bool:
        return self.status == "done"


def write_note(trial: Trial, event: str, **details: Any) -> None:
    """Writes the last event of a trial into its note."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_atomic(trial.note, json.dumps({"format": FORMAT_VERSION, "event": event, "when": now} | details) + "\n")


def write_end_note(trial: Trial, code: int, **details: Any) -> None:
    """Writes how a trial ended, unless it was cancelled."""
    if read_note(trial).get("event") != "cancelled":
        write_note(trial, "ended", code=code, **details)


def read_note(trial: Trial) -> dict[str, Any]:
    """The last event of a trial; empty if there is none."""
    return read_json(trial.note) if trial.note.exists() else {}


def state_of(trial: Trial, ours: bool = False) -> TrialState:
    """The state of a trial, from its folder, lock and note; `ours`: it is an unfinished job of this process."""
    result = trial.folder / RESULT
    if result.exists() and not ours:
        r = read_json(result)
        seconds = max(r.get("seconds") or 0.0, read_note(trial).get("seconds") or 0.0)  # the note's include start-up
        return TrialState(
            "done", r["steps"], val_loss=r.get("val_loss"), seconds=seconds, memory_bytes=r.get("memory_bytes")
        )
    latest = _latest_metrics(trial.folder)
    who = lock.holder(trial.folder)
    last = read_note(trial)
    if who:
        return TrialState("running", why="" if ours else who, **latest)
    if ours:
        return TrialState("waiting" if last.get("event") == "submitted" else "running", **latest)
    if last.get("event") == "cancelled":
        return TrialState("cancelled", why=last["why"], **latest)
    if last.get("event") == "ended" and last["code"] not in STOPPED:
        return TrialState("failed", why=last.get("why") or _exit_reason(last["code"]), **latest)
    return TrialState("stopped" if trial.folder.exists() else "new", **latest)


def _exit_reason(code: int) -> str:
    """Why a process failed, from its exit code."""
    if code > 0:
        return f"exit code {code}"
    reason = f"ended by signal {-code} ({signal.strsignal(-code)})"
    if code == -signal.SIGKILL:
        reason += ", perhaps out of memory"
    return reason


def _latest_metrics(folder: Path) -> dict[str, Any]:
    """The last step, training loss, validation loss and speed in a run's metrics.jsonl."""
    latest: dict[str, Any] = {}
    for line in read_tail(folder / METRICS, TAIL_BYTES).splitlines():
        with contextlib.suppress(
            ValueError, KeyError, TypeError, AttributeError
        ):  # a line that is cut off or being written
            values = json.loads(line)
            latest |= {"step": values["step"]}
            latest |= {name: values[name] for name in ("loss", "val_loss", "tokens_per_second") if name in values}
    return latest


def last_lines(trial: Trial) -> list[str]:
    """The last lines of a trial's log."""
    return [line for line in read_tail(trial.log, TAIL_BYTES).splitlines() if line.strip()][-LAST_LINES:]


def flops(e: Experiment) -> float:
    """The FLOPs of training an experiment."""
    return flops_per_token(sized(e).model) * tokens(e)


def tokens(e: Experiment) -> int:
    """The number of tokens that an experiment reads in training."""
    return e.train.steps * e.train.batch_size * e.model.context_length


def sized(e: Experiment) -> Experiment:
    """A resolved experiment, with an estimate of the vocabulary size before the tokenizer exists."""
    vocab_size = 128
    if e.data.tokenizer == "sentencepiece":
        vocab_size = e.data.tokenizer_vocab_size
    elif e.data.tokenizer == "byte":
        vocab_size = 257
    return e.resolved(vocab_size, e.data.labels)


def memory_needed(e: Experiment, cores: int = 1) -> float:
    """A rough estimate of the bytes that training takes: weights, gradients, moments, activations and logits.

    Each core that processes a part of the batch has its own copy of the weights.
    """
    m = sized(e).model
    microbatch = e.train.batch_size / e.train.microbatches
    activations = m.num_layers * (16 * m.embed_dim + 2 * (m.ffn_dim or 0) + 2 * m.num_heads * m.context_length)
    per_row = 4 * (activations + 3 * (m.vocab_size or 0)) * m.context_length
    if e.optim.noise_multiplier is not None:
        per_row += 8 * num_params(m)["total"]  # the per-example gradient, and its clipped copy
    copies = (
        BYTES_PER_WEIGHT * num_params(m)["total"] * largest_divisor(e.train.batch_size // e.train.microbatches, cores)
    )
    return PROCESS_BYTES + copies + per_row * microbatch


def seconds_needed(trials: Sequence[Trial], states: Mapping[str, TrialState], peak: float | None) -> dict[str, float]:
    """The estimated seconds that each trial still takes; empty if no speed is known.

    A running trial is estimated at its own speed. Others are estimated from their FLOPs, at the speed of the finished
    trials, else of the running ones, else at a share of the machine's peak in FLOP/s.
    """
    costs = {t.name: flops(t.experiment) for t in trials}
    done = [(costs[t.name], s.seconds) for t in trials if (s := states[t.name]).done and s.seconds]
    speeds = {t.name: costs[t.name] / tokens(t.experiment) * s.tokens_per_second
              for t in trials if (s := states[t.name]).tokens_per_second}  # fmt: skip
    if not done and not speeds and peak is None:
        return {}
    if done:
        usual_speed = sum(cost for cost, _ in done) / sum(seconds for _, seconds in done)
    else:
        usual_speed = fmean(speeds.values()) if speeds else ASSUMED_MFU * (peak or 0)
    left = {t.name: 0.0 if (s := states[t.name]).done else 1 - s.step / t.experiment.train.steps for t in trials}
    return {name: costs[name] * share / speeds.get(name, usual_speed) for name, share in left.items()}
