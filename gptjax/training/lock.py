"""One process at a time writes a run folder. The lock names its holder, and is known to be stale when that has gone.

On one machine the kernel knows: `flock` ends with the process that holds it, however that ends. To other machines,
which a shared file system may not tell, the holder shows that it lives by touching the file.
"""

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from gptjax.errors import RunError

NAME = "lock.json"
ALIVE_SECONDS = 60.0  # a lock of another machine that was touched within this time is held
LOOKS = 5  # how often a lock that is held is tried again: `holder` of another process holds it for an instant


class Lock:
    """A held lock."""

    def __init__(self, path: Path, file: TextIO):
        self._path, self._file = path, file

    def touch(self) -> None:
        """Shows to other machines that the holder lives."""
        os.utime(self._file.fileno())


@contextmanager
def hold(folder: Path) -> Iterator[Lock]:
    """Holds the lock of a run folder, which is made if need be, and taken away again if nothing was put in it.

    Raises `RunError` naming the host and the process that holds it.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    file = _acquire(path)
    try:
        yield Lock(path, file)
    finally:
        path.unlink(missing_ok=True)  # while it is held: who opened it in vain sees that it is no longer there
        file.close()
        if new and not any(folder.iterdir()):
            folder.rmdir()


def holder(folder: Path) -> str | None:
    """Who is training in a run folder, on this machine or another; None: nobody. Takes nothing over."""
    try:
        file = os.fdopen(os.open(folder / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "r")
    except OSError:
        return None
    with file:
        told = _holder(file)
        silent = time.time() - os.fstat(file.fileno()).st_mtime
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _name(told)
        except OSError:
            return _name(told) if silent < ALIVE_SECONDS else None
        return _name(told) if told.get("host") not in (None, socket.gethostname()) and silent < ALIVE_SECONDS else None


def _acquire(path: Path) -> TextIO:
    kernel_knows, looks = True, 0
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if (looks := looks + 1) < LOOKS:
                file.close()
                time.sleep(0.02)
                continue
            raise _refusal(path, _holder(file)) from None
        except OSError:  # the file system has no flock: only what the holder shows is left
            kernel_knows = False
        if _is_at(path, file):
            break
        file.close()  # its holder has just removed it
    before, here = _holder(file), socket.gethostname()
    silent = time.time() - os.fstat(file.fileno()).st_mtime
    if before and (before.get("host") != here or not kernel_knows) and silent < ALIVE_SECONDS:
        file.close()
        raise _refusal(
            path, before, f"it showed itself {silent:.0f} s ago; if it has ended, wait {ALIVE_SECONDS:.0f} s"
        )
    if before:
        print(f"{path.parent}: the lock of {_name(before)}, which has ended without letting go, is taken over",
              file=sys.stderr, flush=True)  # fmt: skip
    file.seek(0)
    file.truncate()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    json.dump({"format": 1, "host": here, "pid": os.getpid(), "since": now}, file)
    file.flush()
    os.fsync(file.fileno())
    return file


def _is_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _holder(file: TextIO) -> dict[str, object]:
    """Who wrote the lock; empty for a new one."""
    try:
        found = json.loads(file.read(4096) or "{}")
    except ValueError:
        found = {"host": "an unknown host"}
    return found if isinstance(found, dict) else {}


def _name(holder: dict[str, object]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')} (since {holder.get('since', '?')})"


def _refusal(path: Path, holder: dict[str, object], more: str = "") -> RunError:
    return RunError(
        f"{path.parent}: {_name(holder)} is training here{'; ' + more if more else ''}; "
        "wait for it, stop it, or choose another --run-dir"
    )
