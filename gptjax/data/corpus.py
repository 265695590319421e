"""Sources of text: files and folders, hub data sets, functions, and Python's own language reference ("pydoc").

A source is a string. `iter_documents` gives its documents, `iter_rows` the rows of its tables, and `fingerprint` a hash
of its content. `$NAME` in a path is an environment variable, so that an experiment need not name a machine's folders.
"""

import csv
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gptjax.config import DataConfig
from gptjax.data import synthetic
from gptjax.errors import DataError

TEXT = (".txt", ".md", ".rst", ".py")  # one file is one document
TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # one row is one document
Rows = Iterator[tuple[dict[str, Any], str]]  # each row with its file and line or number
LARGEST_CELL = 1 << 30  # characters of a csv cell; the reader's default is that of a spreadsheet
ORIGINS = {
    "tinyshakespeare.txt": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
}


def iter_documents(source: str, data: DataConfig) -> Iterator[str]:
    """The documents of one source, in a fixed order, without empty ones.

    Raises `DataError` with the file, and the line or row, for text that is missing, malformed or not UTF-8.
    """
    documents = itertools.islice(_iter_documents(source, data), data.max_documents)
    first = next(documents, None)
    if first is None:
        raise DataError(f"data.source = {source!r}: has no text; give a source with at least one document")
    yield first
    yield from documents


def fingerprint(source: str, data: DataConfig) -> str:
    """A hash of every byte of the source that does not depend on its path."""
    digest = hashlib.sha256(f"{data.column} {data.max_documents}".encode())
    if source == "pydoc":
        for text in _pydoc():
            digest.update(text.encode())
    elif synthetic.is_function(source):
        for document, _ in synthetic.generate_documents(source, data):
            digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    elif source.startswith("hub:"):
        builder = _hub_builder(source, data)  # its hash is that of the data set's revision
        digest.update(f"{source} {data.hub_config} {data.hub_split} {builder.hash}".encode())
    else:
        for path in files(source):
            digest.update(path.suffix.encode())
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def iter_rows(source: str, data: DataConfig) -> Rows:
    """The rows of one source's tables, in a fixed order, each with its file and the line where it begins.

    Formats without lines (parquet, a JSON array, the hub) have the number of the row instead.
    Raises `DataError` as `iter_documents` does, and for a file that is not a table.
    """
    if source.startswith("hub:"):
        yield from _numbered(_hub_rows(source, data), source)
        return
    if synthetic.is_function(source):
        for row, where in synthetic.generate_documents(source, data):
            if isinstance(row, str):
                raise DataError(f"{where}: returns a text; data.prompt and data.answer need a dict of columns")
            yield row, where
        return
    for path in files(source):
        if path.suffix not in TABLES:
            raise DataError(
                f"{path}: has no columns for data.prompt and data.answer; give a {' or '.join(TABLES)} file"
            )
        yield from _table(path)


def hash_fraction(text: str) -> float:
    """A hash of the text in [0, 1). A split by it keeps every text on its side when other texts are added."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8]) / 2**64


def files(source: str) -> list[Path]:
    """The files of a path: the file itself, or all files in the folder with a known ending, sorted.

    Raises `DataError` for a path that does not exist, with the address of the data if it is known.
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


def _iter_documents(source: str, data: DataConfig) -> Iterator[str]:
    if source == "pydoc":
        yield from _pydoc()
    elif synthetic.is_function(source):
        for document, where in synthetic.generate_documents(source, data):
            yield from [document] if isinstance(document, str) else _texts(iter([(document, where)]), data.column)
    elif source.startswith("hub:"):
        yield from _texts(iter_rows(source, data), data.column)
    else:
        for path in files(source):
            yield from [_read_text(path)] if path.suffix in TEXT else _texts(_table(path), data.column)


def _pydoc() -> Iterator[str]:
    from pydoc_data.topics import topics  # half a megabyte, loaded only if used

    return (topics[name] for name in sorted(topics))


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: byte {e.start} is not UTF-8; convert the file, for instance with iconv") from None
    if not text:
        raise DataError(f"{path}: is empty; remove it from the source, or put text in it")
    return text


def _table(path: Path) -> Rows:
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; remove it from the source, or put rows in it")
    if path.suffix == ".jsonl":
        yield from _json_lines(path)
    elif path.suffix == ".csv":
        yield from _csv_lines(path)
    else:
        yield from _other_table(path)


def _json_lines(path: Path) -> Rows:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as e:
                raise DataError(f"{where}: cannot be read as json: {e}") from None
            if line.strip() and not isinstance(row, dict):
                raise DataError(f"{where}: holds {line[:40].decode()!r}; a JSON object with the columns is needed")
            if row is not None:
                yield row, where


def _csv_lines(path: Path) -> Rows:
    """The rows below the header line. A quoted cell may span several lines."""
    csv.field_size_limit(LARGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        done = 0  # lines before the current row
        try:
            names = next(reader, [])
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(f"{path}, line 1: has the column {twice[0]!r} twice; rename one of them")
            done = reader.line_num
            for cells in reader:
                where, done = f"{path}, line {done + 1}", reader.line_num
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise DataError(
                        f"{where}: has {len(cells)} cells, but the first line has {len(names)} columns; put a cell "
                        'with a comma or a line break in quotes, "like, this"'
                    )
                yield dict(zip(names, cells, strict=True)), where
        except csv.Error as e:
            raise DataError(f"{path}, line {done + 1}: cannot be read as csv: {e}") from None
        except UnicodeDecodeError:
            raise DataError(f"{path}, line {_bad_line(path, bytes.decode)}: is not UTF-8; convert the file") from None


def _other_table(path: Path) -> Rows:
    import datasets  # takes two seconds to import, and only a new store needs it

    kind = TABLES[path.suffix]
    try:
        table = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
        yield from _numbered(table, str(path))
    except Exception as e:  # the readers have no error class of their own
        line = _bad_line(path, json.loads) if kind == "json" else None
        where = f", line {line}" if line else ""
        raise DataError(f"{path}{where}: cannot be read as {kind}: {_root_cause(e)}") from None


def _numbered(table: Iterable[dict[str, Any]], name: str) -> Rows:
    return ((row, f"{name}, row {number}") for number, row in enumerate(table, 1))


def _texts(table: Rows, column: str) -> Iterator[str]:
    for row, where in table:
        if column not in row:
            raise DataError(f"{where}: has no column {column!r} (data.column); it has {', '.join(row)}")
        text = row[column]
        if not isinstance(text, str):
            raise DataError(f"{where}, column {column!r}: holds {text!r}; text is needed")
        if text:
            yield text


def _bad_line(path: Path, read: Callable[[bytes], Any]) -> int | None:
    """The number of the first line that cannot be read."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                read(line)
            except ValueError:
                return number
    return None


def _root_cause(e: BaseException) -> str:
    while e.__cause__ is not None:
        e = e.__cause__
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__


def _hub_rows(source: str, data: DataConfig) -> Any:
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


def _hub_builder(source: str, data: DataConfig) -> Any:
    import datasets

    name = source.removeprefix("hub:")
    try:
        return datasets.load_dataset_builder(name, data.hub_config)
    except Exception as e:
        raise DataError(
            f"data.source = {source!r}: not found on the hub, or the hub cannot be reached ({_root_cause(e)}); "
            "check the name, data.hub_config and the network, or give a local file"
        ) from None
