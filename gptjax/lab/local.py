"""Trials as processes of this machine: each worker has a share of its cores, or GPUs of its own."""

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
from gptjax.lab.progress import memory_needed, note, note_end
from gptjax.lab.trials import Trial


@dataclass(frozen=True)
class Slot:
    """What one worker may use."""

    cores: frozenset[int]
    gpus: tuple[str, ...] = ()
    share: float = 1.0  # of the memory of its GPU, where several workers have the same one

    def environment(self) -> dict[str, str]:
        if not self.gpus:
            return {}
        part = {} if self.share == 1 else {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 * self.share:.3f}"}
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} | part


def gpus() -> list[str]:
    """The GPUs of this machine that may be used; none where there is no NVIDIA driver."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    told = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return [str(i) for i, line in enumerate(told.stdout.splitlines()) if line.startswith("GPU ")]


def places(workers: int, cores: Sequence[int], cards: Sequence[str]) -> list[Slot]:
    """The machine divided among workers: cores evenly, GPUs evenly, or several workers to a GPU."""
    made, on_a_card = [], -(-workers // len(cards)) if cards else 1
    for i in range(workers):
        part = cores[i * len(cores) // workers : (i + 1) * len(cores) // workers] or [cores[i % len(cores)]]
        own = tuple(cards[i::workers]) or tuple(cards[i % len(cards) :][:1] if cards else ())
        made.append(Slot(frozenset(part), own, 1 / on_a_card))
    return made


def memory_available() -> float:
    """Bytes of this machine's memory that nobody uses; without bound where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * float(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return float("inf")


class Process:
    """A trial that is being trained here."""

    def __init__(self, trial: Trial, place: Slot, reserved: float):
        self.trial, self.place, self.reserved = trial, place, reserved
        self._began = time.monotonic()
        self._code: int | None = None
        self._asked = False  # to stop
        note(trial, "started")  # what stands there from an earlier start is over
        with trial.log.open("ab") as log:
            self._process = subprocess.Popen(
                trial.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | place.environment(),
                start_new_session=True,  # Ctrl-C is told to it by the sweep, once
            )
        if hasattr(os, "sched_setaffinity"):  # Linux; the threads that it starts later inherit it
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(self._process.pid, place.cores)

    def poll(self) -> int | None:
        """The exit code of the trial; None while it runs."""
        if self._code is None and (code := self._process.poll()) is not None:
            self._code = EXIT_INTERRUPTED if code < 0 and self._asked else code
            note_end(self.trial, self._code, seconds=round(time.monotonic() - self._began, 1))
        return self._code

    def stop(self) -> None:
        """Asks it to save and stop."""
        self._asked = True
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Stops it at once: its last checkpoint stays."""
        self._asked = True
        self._process.kill()


class Local:
    """Starts as many trials as there are workers and there is memory for."""

    def __init__(self, workers: int):
        cores = (
            sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        )
        self._free = places(workers, cores, cards := gpus())
        self._memory = float("inf") if cards else memory_available()
        self._running: list[Process] = []

    def adopt(self, trials: Sequence[Trial]) -> dict[str, Process]:
        """None: a process whose sweep has ended goes on by itself, and is known by its lock."""
        return {}

    def start(self, trials: Sequence[Trial], measured: Mapping[str, int]) -> dict[str, Process]:
        """Starts what there is room for, in this order; `measured`: bytes that trials of a variant were seen to take.

        Where nothing runs, the first is started in any case.
        """
        for process in [p for p in self._running if p.poll() is not None]:
            self._running.remove(process)
            self._free.append(process.place)
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
