"""A thread that ends this process, naming the cause, when it is stuck or when another process of the job is gone.

Each process of a job shows in RUN/processes/ what it is doing; the others read it every few seconds. One that failed is
noticed at the next look, one that was killed or frozen after `GONE_SECONDS`, and whoever makes no progress for
`train.watchdog_seconds` shows the stacks of its threads and ends.
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

LOOK_SECONDS = 2.0  # between two looks at the others
GONE_SECONDS = 30.0  # of silence after which another process counts as gone
FOLDER = "processes"


class Watchdog:
    """Watches over a run from its folder until `close`; `watchdog_seconds` counts from the first `heartbeat`."""

    def __init__(self, folder: Path, watchdog_seconds: float, tick: Callable[[], None] | None = None):
        self._folder, self._watchdog_seconds, self._tick = folder / FOLDER, watchdog_seconds, tick
        self._me, self._count = jax.process_index(), jax.process_count()
        self.doing = "starting"
        self._since: float | None = None
        self._looks = 0
        self._heard: dict[int, tuple[Any, float]] = {}  # peer -> (what it last showed, when that was new)
        self._over = threading.Event()
        self._job = ""  # tells what the processes of this job show from what those of an earlier one left
        if self._count > 1:
            self._job = sharding.on_first_process(lambda: os.urandom(8).hex())
            self._folder.mkdir(parents=True, exist_ok=True)
            self._show("running")
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._thread.start()

    def heartbeat(self, doing: str) -> None:
        """Progress: this is what is being done from now on."""
        self.doing, self._since = doing, time.monotonic()

    def close(self, failure: BaseException | None = None) -> None:
        """Stops watching; tells the others how it ended here."""
        self._over.set()
        self._thread.join()
        if self._count > 1:
            self._show("failed" if failure else "ended", str(failure or ""))
            self._linger(failure is not None)

    def explain(self) -> str:
        """What became of the others, for an error in what is done together: waits until one is known to be gone."""
        until = time.monotonic() + GONE_SECONDS + 2 * LOOK_SECONDS
        while time.monotonic() < until:
            if lost := self._lost():
                return lost
            time.sleep(LOOK_SECONDS / 4)
        return "no other process is known to have failed"

    def _run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            if self._tick:
                with contextlib.suppress(OSError):  # a moment's trouble of the disk is no reason to stop watching
                    self._tick()
            silent = time.monotonic() - self._since if self._since is not None else 0.0
            if silent > self._watchdog_seconds:
                self._end(
                    f"stuck: no progress for {silent:.0f} s (train.watchdog_seconds), in {self.doing}; "
                    f"the stacks of all threads are above{self._others()}",
                    stacks=True,
                )
            if self._count > 1:
                self._show("running")
                if lost := self._lost():
                    time.sleep(LOOK_SECONDS)  # the error that it causes here, if there is one, says more
                    if not self._over.is_set():
                        self._end(lost)

    def _lost(self) -> str | None:
        """The first of the others that has failed or fallen silent, and how."""
        for peer, shown in self._look().items():
            name = f"process {peer} ({shown.get('host', 'never seen')}, pid {shown.get('pid', '?')})"
            if shown.get("state") == "failed":
                return f"{name} failed in {shown['doing']}: {shown['error']}"
            silent = time.monotonic() - self._heard[peer][1]
            if silent > GONE_SECONDS and shown.get("state") != "ended":
                return f"{name} is gone: nothing was heard of it for {silent:.0f} s, last in {shown.get('doing', '?')}"
        return None

    def _look(self) -> dict[int, dict[str, Any]]:
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
        lines = [f"process {peer} is in {shown.get('doing', '?')}" for peer, shown in self._look().items()]
        return "; " + ", ".join(lines) if lines else ""

    def _show(self, state: str, error: str = "") -> None:
        self._looks += 1
        who = {"job": self._job, "host": socket.gethostname(), "pid": os.getpid()}
        shown = who | {"state": state, "doing": self.doing, "error": error[:2000], "looks": self._looks}
        scratch = self._folder / f".{self._me}.json"
        with contextlib.suppress(OSError):  # a full disk shows itself where something is lost by it
            scratch.write_text(json.dumps(shown))
            scratch.replace(self._folder / f"{self._me}.json")

    def _end(self, why: str, stacks: bool = False) -> None:
        """Ends the process at once: its main thread is stuck in something that cannot be interrupted."""
        if stacks:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if self._count > 1:
            self._show("failed", why)
        print(f"gptjax: process {self._me}: {why}. The last checkpoint is whole; the same command goes on from it",
              file=sys.stderr, flush=True)  # fmt: skip
        self._linger(self._count > 1)
        os._exit(EXIT_FAILED)

    def _linger(self, failed: bool) -> None:
        """Lets the others say what they have to: when process 0 has gone, jax aborts them in the midst of a word."""
        if failed and self._me == 0:
            time.sleep(2 * LOOK_SECONDS)
