"""Where text comes from: files and folders, hub data sets, and the language reference inside every Python.

A source is a string; `read` gives its documents one after the other and `fingerprint` a hash of what they are made of.
`$NAME` in a path is taken from the environment, so that an experiment names no machine's folders.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.config import Data
from gptjax.errors import DataError

TEXT = (".txt", ".md", ".rst", ".py")  # one file is one document
TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # one row is one document
ORIGINS = {
    "tinyshakespeare.txt": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
}


def read(source: str, data: Data) -> Iterator[str]:
    """The documents of one source, in a fixed order, empty ones left out.

    Raises `DataError` naming the file, and the line or row, for text that is missing, malformed or not UTF-8.
    """
    documents = itertools.islice(_read(source, data), data.max_documents)
    first = next(documents, None)
    if first is None:
        raise DataError(f"data.source = {source!r}: has no text in it; give a source with at least one document")
    yield first
    yield from documents


def fingerprint(source: str, data: Data) -> str:
    """A hash that changes with any byte of the source, and does not depend on where it lies."""
    digest = hashlib.sha256(f"{data.column} {data.max_documents}".encode())
    if source == "pydoc":
        for text in _pydoc():
            digest.update(text.encode())
    elif source.startswith("hub:"):
        builder = _hub_builder(source, data)  # whose hash is that of the data set's revision
        digest.update(f"{source} {data.hub_config} {data.hub_split} {builder.hash}".encode())
    else:
        for path in files(source):
            digest.update(path.suffix.encode())
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def files(source: str) -> list[Path]:
    """The files of a path: itself, or all in the folder with a known ending, sorted.

    Raises `DataError` for a path that does not exist, with the place to get it where that is known.
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
    known = (*TEXT, *TABLES)
    if path.is_file():
        if path.suffix not in known:
            raise DataError(f"data.source = {source!r}: ends in {path.suffix!r}; known are {' '.join(known)}")
        return [path]
    if found := sorted(p for p in path.rglob("*") if p.suffix in known and p.is_file()):
        return found
    raise DataError(f"data.source = {source!r}: no file in this folder ends in {' '.join(known)}")


def _origin(path: Path) -> str:
    return f" (get it from {ORIGINS[path.name]})" if path.name in ORIGINS else ""


def _read(source: str, data: Data) -> Iterator[str]:
    if source == "pydoc":
        yield from _pydoc()
    elif source.startswith("hub:"):
        yield from _texts(_hub_rows(source, data), data.column, source)
    else:
        for path in files(source):
            yield from [_read_text(path)] if path.suffix in TEXT else _read_table(path, data.column)


def _pydoc() -> Iterator[str]:
    from pydoc_data.topics import topics  # half a megabyte, wanted only here

    return (topics[name] for name in sorted(topics))


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: byte {e.start} is not UTF-8; convert the file, for instance with iconv") from None
    if not text:
        raise DataError(f"{path}: is empty; remove it from the source, or put text in it")
    return text


def _read_table(path: Path, column: str) -> Iterator[str]:
    import datasets  # two seconds, wanted only where a store is built from a table

    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; remove it from the source, or put rows in it")
    kind = TABLES[path.suffix]
    try:
        words = {"keep_default_na": False} if kind == "csv" else {}  # "NA" is a word like any other
        table = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True, **words)
        yield from _texts(table, column, str(path))
    except DataError:
        raise
    except Exception as e:  # the readers raise whatever their engine does
        where = _bad_line(path) if kind == "json" else ""
        raise DataError(f"{path}{where}: cannot be read as {kind}: {_root_cause(e)}") from None


def _texts(rows: Any, column: str, where: str) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        if column not in row:
            raise DataError(f"{where}: has no column {column!r} (data.column); it has {', '.join(row)}")
        text = row[column]
        if not isinstance(text, str):
            raise DataError(f"{where}: row {number}, column {column!r} holds {text!r}; text is needed")
        if text:
            yield text


def _bad_line(path: Path) -> str:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line)
            except ValueError:
                return f", line {number}"
    return ""


def _root_cause(e: BaseException) -> str:
    while e.__cause__ is not None:
        e = e.__cause__
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__


def _hub_rows(source: str, data: Data) -> Any:
    builder = _hub_builder(source, data)
    try:
        if data.streaming:
            return builder.as_streaming_dataset(data.hub_split)
        builder.download_and_prepare()
        return builder.as_dataset(data.hub_split)
    except Exception as e:
        raise DataError(
            f"data.source = {source!r}, data.hub_split = {data.hub_split!r}: cannot be read ({_root_cause(e)})"
        ) from None


def _hub_builder(source: str, data: Data) -> Any:
    import datasets

    name = source.removeprefix("hub:")
    try:
        return datasets.load_dataset_builder(name, data.hub_config)
    except Exception as e:
        raise DataError(
            f"data.source = {source!r}: not found on the hub, or the hub cannot be reached ({_root_cause(e)}); "
            "check the name, data.hub_config and the network, or give a local file"
        ) from None
