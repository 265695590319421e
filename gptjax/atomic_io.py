"""Files that last: written so that a crash leaves the old content or the new, read so that a bad one does no harm."""

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.errors import RunError

LARGEST_TEXT = 1 << 28  # bytes: no file of JSON in a run folder comes near it


def write_atomic(path: Path, content: str | bytes, new: bool = False) -> None:
    """Replaces a file so that, whatever happens, either the old or the new content is there.

    With `new` nothing is replaced: raises `FileExistsError` where there is such a file, as another process made one.
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
        except OSError:  # a file system without links: the best that is left
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
    """Waits until no other process of this machine is in here with the same folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network file system that cannot lock a folder
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Returns when what was made, renamed or removed in a folder is on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """`sync_folder` for everything below a folder, and its files as well."""
    for root, _, names in os.walk(folder):
        for name in names:
            with Path(root, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """The content of a plain file. Raises `RunError` for a link, a device or a giant: it may be a stranger's."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise RunError(f"{path}: is a link or a device, not a plain file; gptjax does not follow it")
    if status.st_size > largest:
        raise RunError(f"{path}: has {status.st_size:,} bytes, more than the {largest:,} that such a file may have")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise RunError(f"{path}: is damaged ({e})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises `RunError` where it does not."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise RunError(f"{path}: is damaged ({e})") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: is damaged (a JSON object was expected)")
    return value


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
