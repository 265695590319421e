"""Contestants in processes of their own that take turns (A B A B ...): what every comparison here is made with.

A benchmark calls itself with `--serve` and the contestant's arguments. That process prints its metrics as one line of
JSON when it is ready. For every number that it is sent it then works that many times and prints the seconds it took.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


class Worker:
    """One contestant, ready to work in a process of its own."""

    def __init__(self, *arguments: str):
        command = [sys.executable, sys.argv[0], "--serve", *arguments]
        # Nothing about threads, as PASSIVE waiting slows PyTorch; on a GPU both must find room at once.
        environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would fill up
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )
        self.figures: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        if not (line := self.process.stdout.readline()).startswith("{"):
            self.errors.seek(0)
            errors = self.errors.read()[-2000:]
            raise SystemExit(f"{' '.join(self.process.args[3:])} ended; pip install 'gptjax[bench]'?\n{errors}")  # type: ignore[index]
        return json.loads(line)

    def seconds(self, times: int) -> float:
        """Seconds of each of so many times; `figures` has the peak of memory afterwards."""
        assert self.process.stdin
        self.process.stdin.write(f"{times}\n")
        self.process.stdin.flush()
        reply = self._read()
        self.figures |= {"peak": reply["peak"]}
        return reply["seconds"] / times

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def serve(work: Callable[[], None], figures: Mapping[str, Any] | None = None) -> None:
    """The other side of `Worker`. `work` has been done often enough to be warm."""
    print(json.dumps(figures or {}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            work()
        print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak_bytes()}), flush=True)


def device_of(kind: str) -> tuple[str, str]:
    """Where a contestant works, "cpu" or "cuda" in PyTorch's words, and the name of the device."""
    if kind == "gptjax":
        import jax

        from gptjax import cpu

        cpu.use_cores()
        device = jax.devices()[0]
        return "cuda" if device.platform == "gpu" else "cpu", device.device_kind
    import torch

    return ("cuda", torch.cuda.get_device_name()) if torch.cuda.is_available() else ("cpu", "cpu")


def peak_bytes() -> int:
    """Peak memory of this process so far, in bytes; on a GPU that of the device, if PyTorch or JAX reports it."""
    if "torch" in sys.modules and (torch := sys.modules["torch"]).cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if "jax" in sys.modules and (stats := sys.modules["jax"].local_devices()[0].memory_stats()):
        return stats.get("peak_bytes_in_use", 0)
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def take_turns(workers: Mapping[str, Worker], times: int, rounds: int) -> dict[str, list[float]]:
    """Seconds each, one figure a round of every worker; closes them."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            seconds[name].append(worker.seconds(times))
    for worker in workers.values():
        worker.close()
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, str]:
    """How many times as fast ours is, by the medians; and that as text, with the smallest and largest round."""
    each = [b / a for a, b in zip(ours, theirs, strict=True)]
    typical = statistics.median(theirs) / statistics.median(ours)
    return typical, f"{typical:.2f}x (rounds {min(each):.2f} to {max(each):.2f})"
