"""Sources of text: files and folders, hub data sets, functions, and Python's own language reference ("pydoc").

A source is a string. `iter_documents` gives its documents, `iter_rows` the rows of its tables, and `fingerprint` a hash
of its content. `$NAME` in a path is an environment variable, so that an experiment need not name a machine's folders.
"""

import csv
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptjax.config import DataConfig
from gptjax.data import synthetic
from gptjax.data.files import TABLES, TEXT, ending, full_ending, open_bytes, source_files
from gptjax.errors import DataError

Rows = Iterator[tuple[dict[str, Any], str]]  # each row with its file and line or number
LARGEST_CELL = 1 << 30  # characters of a csv cell; the reader's default is that of a spreadsheet


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
        for path in source_files(source):
            digest.update(full_ending(path).encode())
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
    for path in source_files(source):
        if ending(path) not in TABLES:
            raise DataError(
                f"{path}: has no columns for data.prompt and data.answer; give a {' or '.join(TABLES)} file"
            )
        yield from _table(path)


def hash_fraction(text: str) -> float:
    """A hash of the text in [0, 1). A split by it keeps every text on its side when other texts are added."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8]) / 2**64


def _iter_documents(source: str, data: DataConfig) -> Iterator[str]:
    if source == "pydoc":
        yield from _pydoc()
    elif synthetic.is_function(source):
        for document, where in synthetic.generate_documents(source, data):
            if isinstance(document, str):
                _refuse_surrogates(document, where)
                yield document
            else:
                yield from _texts(iter([(document, where)]), data.column)
    elif source.startswith("hub:"):
        yield from _texts(iter_rows(source, data), data.column)
    else:
        for path in source_files(source):
            if ending(path) in TEXT:
                yield _read_text(path)
            else:
                yield from _texts(_table(path), data.column)


def _pydoc() -> Iterator[str]:
    from pydoc_data.topics import topics  # half a megabyte, loaded only if used

    return (topics[name] for name in sorted(topics))


def _read_text(path: Path) -> str:
    with _reading(path), open_bytes(path) as file:
        content = file.read()
    try:
        text = content.decode()
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: byte {e.start} is not UTF-8; convert the file, for instance with iconv") from None
    if not text:
        raise DataError(f"{path}: is empty; remove it from the source, or put text in it")
    return text


def _table(path: Path) -> Rows:
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; remove it from the source, or put rows in it")
    read = {".jsonl": _json_lines, ".json": _json, ".csv": _csv_lines, ".parquet": _parquet}[ending(path)]
    with _reading(path):
        for row, where in read(path):
            _refuse_surrogates(row, where)
            yield row, where


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns an error of the disk or of damaged compressed data into a `DataError` with the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: cannot be read ({e})") from None


def _json(path: Path) -> Rows:
    """The objects of one array, or of one object a line."""
    with open_bytes(path) as file:
        first = file.read(4096).lstrip()[:1]
    if first != b"[":
        yield from _json_lines(path)
        return
    with open_bytes(path) as file:
        rows = _parse_json(file.read(), str(path))
    for number, row in enumerate(rows, 1):
        yield _columns(row, f"{path}, row {number}")


def _json_lines(path: Path) -> Rows:
    with open_bytes(path) as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            if line.strip():
                yield _columns(_parse_json(line, where), where)


def _parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: cannot be read as json: {e}") from None


def _columns(row: Any, where: str) -> tuple[dict[str, Any], str]:
    if not isinstance(row, dict):
        shown = json.dumps(row, ensure_ascii=False)[:40]
        raise DataError(f"{where}: holds {shown!r}; a JSON object with the columns is needed")
    return row, where


def _refuse_surrogates(value: Any, where: str) -> None:
    """JSON can hold one half of a surrogate pair (\\ud83d), which is no character, and no tokenizer can read it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as e:
            half = value[e.start].encode("unicode_escape").decode()
            raise DataError(f"{where}: holds {half}, which is half a character; remove it or repair the file") from None
    elif isinstance(value, dict):
        for name, part in value.items():
            _refuse_surrogates(name, where)
            _refuse_surrogates(part, f"{where}, column {name!r}")
    elif isinstance(value, list):
        for part in value:
            _refuse_surrogates(part, where)


def _csv_lines(path: Path) -> Rows:
    """The rows below the header line. A quoted cell may span several lines."""
    csv.field_size_limit(LARGEST_CELL)
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as file:
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
            raise DataError(f"{path}, line {_bad_line(path)}: is not UTF-8; convert the file") from None


def _parquet(path: Path) -> Rows:
    import datasets  # takes two seconds to import, and only a new store needs it

    try:
        table = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from _numbered(table, str(path))
    except Exception as e:  # the readers have no error class of their own
        raise DataError(f"{path}: cannot be read as parquet: {_root_cause(e)}") from None


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


def _bad_line(path: Path) -> int | None:
    """The number of the first line that is not UTF-8."""
    with open_bytes(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
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
