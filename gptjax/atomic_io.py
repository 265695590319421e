"""Safe file access: atomic writes that survive a crash, and reads that check untrusted files."""

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gptjax.errors import RunError

LARGEST_TEXT = 1 << 28  # bytes: far above any JSON file in a run folder


def write_atomic(path: Path, content: str | bytes, new: bool = False) -> None:
    """Replaces a file atomically: after a crash it has either the old or the new content.

    With `new` nothing is replaced: raises `FileExistsError` if the file exists.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    if new:
        try:
            os.link(scratch, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links: not quite atomic
            if path.exists():
                raise FileExistsError(path) from None
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    else:
        scratch.replace(path)
    sync_folder(path.parent)


@contextlib.contextmanager
def directory_lock(folder: Path) -> Iterator[None]:
    """Holds an exclusive lock on a folder among the processes of this machine; waits for it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot lock a folder
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Returns when the entries of a folder (created, renamed, removed) are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Syncs a folder, everything below it, and all files."""
    for root, _, names in os.walk(folder):
        for name in names:
            with Path(root, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def open_plain(path: Path) -> BinaryIO:
    """Opens an untrusted file to read its bytes. Raises `RunError` for a pipe or a device, without waiting for it."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise RunError(f"{path}: is not a plain file; remove it")
    return os.fdopen(handle, "rb")


def read_tail(path: Path, size: int) -> str:
    """The end of an untrusted text file, at most `size` bytes; empty if there is no file."""
    try:
        with open_plain(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read(size).decode(errors="replace")
    except FileNotFoundError:
        return ""


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """The content of an untrusted text file. Raises `RunError` for a link, a device or a file that is too large."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise RunError(f"{path}: is a link or a device, and gptjax only reads plain files here")
    if status.st_size > largest:
        raise RunError(f"{path}: has {status.st_size:,} bytes; at most {largest:,} are allowed")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise RunError(f"{path}: is damaged ({e})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in an untrusted file. Raises `RunError` if there is none."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise RunError(f"{path}: is damaged ({e})") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: is damaged (a JSON object was expected)")
    return value


def format_bytes(size: float) -> str:
    """A size in the unit that fits it: `8 bytes`, `4.1 kB`, `1.20 GB`."""
    for unit, digits in (("bytes", 0), ("kB", 1), ("MB", 1)):
        if size < 1000:
            return f"{size:.{digits}f} {unit}"
        size /= 1000
    return f"{size:,.2f} GB"


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
