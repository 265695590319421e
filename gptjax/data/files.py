"""The files of a data source: which files of a folder are read, and how a compressed one is opened."""

import functools
import gzip
import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

from gptjax.errors import DataError, warn

TEXT = (".txt", ".md", ".rst", ".py")  # one file is one document
TABLES = (".jsonl", ".json", ".csv", ".parquet")  # one row is one document
COMPRESSED = (".gz", ".zst")  # may follow the others, but for parquet, which compresses by itself
KNOWN = (*TEXT, *TABLES)
ORIGINS = {
    "tinyshakespeare.txt": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
}


def ending(path: str | Path) -> str:
    """The ending that says how a file is read, in lower case: `.txt` for `A.TXT.gz`, compressed or not."""
    path = Path(path)
    if path.suffix.lower() in COMPRESSED and Path(path.stem).suffix.lower() != ".parquet":
        path = Path(path.stem)
    return path.suffix.lower()


def full_ending(path: Path) -> str:
    """The ending with that of the compression: `A.TXT.gz` -> `.txt.gz`."""
    compression = path.suffix.lower()
    return ending(path) + (compression if compression in COMPRESSED else "")


def open_bytes(path: Path) -> Any:
    """The decompressed bytes of a file. Damage is an `OSError` or `EOFError`, when it is reached."""
    compression = path.suffix.lower()
    if compression == ".gz":
        return gzip.open(path)
    if compression == ".zst":
        import pyarrow  # takes 0.2 s to import

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def source_files(source: str) -> list[Path]:
    """The file of a path, or all files of a folder with a known ending, sorted; hidden ones are left out.

    What is left out of a folder is said once. Raises `DataError` for a path that does not exist, with the address of
    the data if it is known.
    """
    path = Path(os.path.expandvars(source)).expanduser()
    if "$" in str(path):
        name = str(path).partition("$")[2].partition("/")[0]
        raise DataError(
            f"data.source = {source!r}: the environment variable {name} is not set; set it to the folder that "
            f"holds {path.name}{_origin(path)}"
        )
    if not path.exists():
        raise DataError(f"data.source = {source!r}: no such file or folder{_origin(path)}")
    if path.is_file():
        if ending(path) not in KNOWN:
            raise DataError(f"data.source = {source!r}: ends in {path.suffix!r}; {_known()}")
        return [path]
    if not path.is_dir():
        raise DataError(f"data.source = {source!r}: is neither a file nor a folder")
    found, left_out = [], Counter[str]()
    for p in sorted(path.rglob("*")):
        if not p.is_file():
            continue
        if any(part.startswith(".") for part in p.relative_to(path).parts):
            left_out["hidden"] += 1
        elif ending(p) not in KNOWN:
            left_out[f"ending in {p.suffix!r}" if p.suffix else "without an ending"] += 1
        else:
            found.append(p)
    if not found:
        raise DataError(f"data.source = {source!r}: no file in this folder can be read; {_known()}")
    if left_out:
        _say_left_out(source, len(found), tuple(left_out.most_common()))
    return found


@functools.cache  # once for each source
def _say_left_out(source: str, num_read: int, left_out: tuple[tuple[str, int], ...]) -> None:
    kinds = ", ".join(f"{count} {why}" for why, count in left_out[:5])
    more = ", ..." if len(left_out) > 5 else ""
    number = sum(count for _, count in left_out)
    warn(f"data.source = {source!r}: {num_read} files are read and {number} are left out ({kinds}{more}); {_known()}")


def _known() -> str:
    return f"known endings are {' '.join(KNOWN)}, all but .parquet also with {' or '.join(COMPRESSED)}"


def _origin(path: Path) -> str:
    return f" (get it from {ORIGINS[path.name]})" if path.name in ORIGINS else ""
