"""A thread that ends this process, with the reason, when it is stuck or when another process of the job is gone.

Each process of a job writes its activity to RUN/processes/, and reads those of the others every few seconds. A failed
process is noticed at the next check, a killed or frozen one after `GONE_SECONDS`. A process without progress for
`train.watchdog_seconds` prints the stacks of its threads and exits.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gptjax import sharding
from gptjax.atomic_io import read_json
from gptjax.errors import EXIT_FAILED, RunError

CHECK_SECONDS = 2.0  # between two checks of the others
GONE_SECONDS = 30.0  # without a heartbeat after which another process counts as gone
FOLDER = "processes"


class Watchdog:
    """Watches a run until `close`; `watchdog_seconds` counts from the first `heartbeat`."""

    def __init__(self, folder: Path, watchdog_seconds: float, on_tick: Callable[[], None] | None = None):
        self._folder, self._watchdog_seconds, self._tick = folder / FOLDER, watchdog_seconds, on_tick
        self._me, self._count = jax.process_index(), jax.process_count()
        self.activity = "starting"
        self._since: float | None = None
        self._checks = 0
        self._heard: dict[int, tuple[Any, float]] = {}  # peer -> (its last status, the time of its last change)
        self._over = threading.Event()
        self._job = ""  # distinguishes the status files of this job from those of an earlier one
        if self._count > 1:
            self._job = sharding.on_first_process(lambda: os.urandom(8).hex())
            self._folder.mkdir(parents=True, exist_ok=True)
            self._show("running")
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._thread.start()

    def heartbeat(self, activity: str) -> None:
        """Reports progress, and the activity from now on."""
        self.activity, self._since = activity, time.monotonic()

    def close(self, failure: BaseException | None = None) -> None:
        """Stops watching, and reports to the other processes how this one ended."""
        self._over.set()
        self._thread.join()
        if self._count > 1:
            self._show("failed" if failure else "ended", str(failure or ""))
            self._grace_period(failure is not None)

    def explain(self) -> str:
        """Why a collective failed: waits until another process is known to be gone."""
        until = time.monotonic() + GONE_SECONDS + 2 * CHECK_SECONDS
        while time.monotonic() < until:
            if lost := self._lost():
                return lost
            time.sleep(CHECK_SECONDS / 4)
        return "no other process is known to have failed"

    def _run(self) -> None:
        while not self._over.wait(CHECK_SECONDS):
            if self._tick:
                with contextlib.suppress(OSError):  # a temporary problem of the disk must not stop the watchdog
                    self._tick()
            silent = time.monotonic() - self._since if self._since is not None else 0.0
            if silent > self._watchdog_seconds:
                self._end(
                    f"stuck: no progress for {silent:.0f} s (train.watchdog_seconds), in {self.activity}; "
                    f"the stacks of all threads are above{self._others()}",
                    stacks=True,
                )
            if self._count > 1:
                self._show("running")
                if lost := self._lost():
                    time.sleep(CHECK_SECONDS)  # an error that it causes in this process says more
                    if not self._over.is_set():
                        self._end(lost)

    def _lost(self) -> str | None:
        """The first other process that has failed or gone silent, with the reason."""
        for peer, shown in self._read_status().items():
            name = f"process {peer} ({shown.get('host', 'never seen')}, pid {shown.get('pid', '?')})"
            if shown.get("state") == "failed":
                return f"{name} failed in {shown['doing']}: {shown['error']}"
            silent = time.monotonic() - self._heard[peer][1]
            if silent > GONE_SECONDS and shown.get("state") != "ended":
                return f"{name} is gone: no heartbeat for {silent:.0f} s, last in {shown.get('doing', '?')}"
        return None

    def _read_status(self) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for peer in range(self._count):
            if peer == self._me:
                continue
            found[peer] = {}
            with contextlib.suppress(OSError, RunError):
                shown = read_json(self._folder / f"{peer}.json")
                found[peer] = shown if shown.get("job") == self._job else {}
            if peer not in self._heard or self._heard[peer][0] != found[peer]:
                self._heard[peer] = (found[peer], time.monotonic())
        return found

    def _others(self) -> str:
        lines = [f"process {peer} is in {shown.get('doing', '?')}" for peer, shown in self._read_status().items()]
        return "; " + ", ".join(lines) if lines else ""

    def _show(self, state: str, error: str = "") -> None:
        self._checks += 1
        who = {"job": self._job, "host": socket.gethostname(), "pid": os.getpid()}
        shown = who | {"state": state, "doing": self.activity, "error": error[:2000], "looks": self._checks}
        scratch = self._folder / f".{self._me}.json"
        with contextlib.suppress(OSError):  # a full disk is reported where something is lost
            scratch.write_text(json.dumps(shown))
            scratch.replace(self._folder / f"{self._me}.json")

    def _end(self, why: str, stacks: bool = False) -> None:
        """Exits at once: the main thread may be stuck in a call that cannot be interrupted."""
        if stacks:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if self._count > 1:
            self._show("failed", why)
        print(f"gptjax: process {self._me}: {why}. The last checkpoint is intact; the same command resumes from it",
              file=sys.stderr, flush=True)  # fmt: skip
        self._grace_period(self._count > 1)
        os._exit(EXIT_FAILED)

    def _grace_period(self, failed: bool) -> None:
        """Gives the others time for their messages: when process 0 is gone, jax aborts them."""
        if failed and self._me == 0:
            time.sleep(2 * CHECK_SECONDS)
