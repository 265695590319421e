"""Trials as processes on this machine: each worker gets a share of the cores, or its own GPUs."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptjax.errors import EXIT_INTERRUPTED
from gptjax.lab.progress import memory_needed, write_end_note, write_note
from gptjax.lab.trials import Trial


@dataclass(frozen=True)
class Slot:
    """The resources of one worker."""

    cores: frozenset[int]
    gpus: tuple[str, ...] = ()
    share: float = 1.0  # of its GPU's memory, if several workers use the same GPU

    def environment(self) -> dict[str, str]:
        if not self.gpus:
            return {}
        variables = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
        if self.share < 1:
            variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * self.share:.3f}"
        return variables


def gpus() -> list[str]:
    """The usable GPUs of this machine; empty without an NVIDIA driver."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return [str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


def divide_machine(workers: int, cores: Sequence[int], cards: Sequence[str]) -> list[Slot]:
    """A slot for each worker: cores and GPUs are divided evenly; with more workers than GPUs, workers share GPUs."""
    slots = []
    workers_per_gpu = -(-workers // len(cards)) if cards else 1
    for i in range(workers):
        part = cores[i * len(cores) // workers : (i + 1) * len(cores) // workers] or [cores[i % len(cores)]]
        own_gpus = tuple(cards[i::workers])
        if cards and not own_gpus:
            own_gpus = (cards[i % len(cards)],)
        slots.append(Slot(frozenset(part), own_gpus, 1 / workers_per_gpu))
    return slots


def memory_available() -> float:
    """The free memory of this machine in bytes; infinite if the system does not report it."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * float(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return float("inf")


class Process:
    """A trial in training on this machine."""

    def __init__(self, trial: Trial, slot: Slot, reserved: float):
        self.trial = trial
        self.slot = slot
        self.reserved = reserved
        self._started = time.monotonic()
        self._code: int | None = None
        self._stop_requested = False
        write_note(trial, "started")  # replaces the note of an earlier start
        with trial.log.open("ab") as log:
            self._process = subprocess.Popen(
                trial.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | slot.environment(),
                start_new_session=True,  # the sweep forwards Ctrl-C, once
            )
        if hasattr(os, "sched_setaffinity"):  # Linux; the threads that it starts later inherit it
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(self._process.pid, slot.cores)

    def poll(self) -> int | None:
        """The exit code of the trial; None while it runs."""
        if self._code is None and (code := self._process.poll()) is not None:
            self._code = EXIT_INTERRUPTED if code < 0 and self._stop_requested else code
            write_end_note(self.trial, self._code, seconds=round(time.monotonic() - self._started, 1))
        return self._code

    def stop(self) -> None:
        """Requests that it saves and stops."""
        self._stop_requested = True
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Stops it immediately; its last checkpoint stays."""
        self._stop_requested = True
        self._process.kill()


class Local:
    """Starts as many trials as there are workers and memory."""

    def __init__(self, workers: int):
        cores = (
            sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        )
        cards = gpus()
        self._free = divide_machine(workers, cores, cards)
        self._memory = float("inf") if cards else memory_available()
        self._running: list[Process] = []

    def adopt(self, trials: Sequence[Trial]) -> dict[str, Process]:
        """Empty: a process whose sweep has ended runs on its own and is known by its lock."""
        return {}

    def start(self, trials: Sequence[Trial], measured: Mapping[str, int]) -> dict[str, Process]:
        """Starts the trials for which there are resources, in order; `measured`: peak memory in bytes by variant.

        If nothing runs, the first one is started in any case.
        """
        for process in [p for p in self._running if p.poll() is not None]:
            self._running.remove(process)
            self._free.append(process.slot)
        started: dict[str, Process] = {}
        for trial in trials:
            if not self._free:
                break
            needed = measured.get(trial.variant) or memory_needed(trial.experiment, len(self._free[0].cores))
            if self._running and needed + sum(p.reserved for p in self._running) > self._memory:
                continue
            process = Process(trial, self._free.pop(0), needed)
            self._running.append(process)
            started[trial.name] = process
        return started
