"""The lock of a run folder: one process at a time writes it. The lock names its holder; a stale lock is recognized.

On one machine `flock` ends with the process that holds it. For other machines, on shared file systems without `flock`,
the holder updates the modification time of the file as a heartbeat.
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
ALIVE_SECONDS = 60.0  # the lock of another machine counts as held for this long after its last heartbeat
ATTEMPTS = 5  # `holder` in another process may hold the lock for an instant


class Lock:
    """A held lock."""

    def __init__(self, path: Path, file: TextIO):
        self._path, self._file = path, file

    def touch(self) -> None:
        """The heartbeat for other machines."""
        os.utime(self._file.fileno())


@contextmanager
def hold(folder: Path) -> Iterator[Lock]:
    """Holds the lock of a run folder. The folder is created if necessary, and removed again if it stays empty.

    Raises `RunError` naming the host and the process of the holder.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    file = _acquire(path)
    try:
        yield Lock(path, file)
    finally:
        path.unlink(missing_ok=True)  # while held: a process that waits for it sees that the file is gone
        file.close()
        if new and not any(folder.iterdir()):
            folder.rmdir()


def holder(folder: Path) -> str | None:
    """The process that is training in a run folder, on this machine or another; None if there is none."""
    try:
        file = os.fdopen(os.open(folder / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "r")
    except OSError:
        return None
    with file:
        owner = _holder(file)
        silent = time.time() - os.fstat(file.fileno()).st_mtime
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _name(owner)
        except OSError:
            return _name(owner) if silent < ALIVE_SECONDS else None
        return (
            _name(owner) if owner.get("host") not in (None, socket.gethostname()) and silent < ALIVE_SECONDS else None
        )


def _acquire(path: Path) -> TextIO:
    has_flock = True
    attempts = 0
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            attempts += 1
            if attempts < ATTEMPTS:
                file.close()
                time.sleep(0.02)
                continue
            raise _refusal(path, _holder(file)) from None
        except OSError:  # the file system has no flock: only the heartbeat is left
            has_flock = False
        if _is_at(path, file):
            break
        file.close()  # its holder has just removed the file
    before, here = _holder(file), socket.gethostname()
    silent = time.time() - os.fstat(file.fileno()).st_mtime
    if before and (before.get("host") != here or not has_flock) and silent < ALIVE_SECONDS:
        file.close()
        raise _refusal(
            path, before, f"its last heartbeat was {silent:.0f} s ago; if it has ended, wait {ALIVE_SECONDS:.0f} s"
        )
    if before:
        print(f"{path.parent}: took over the lock of {_name(before)}, which has ended without releasing it",
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
    """The holder as written in the lock; empty for a new one."""
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
