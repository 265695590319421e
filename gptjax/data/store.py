"""Tokens on disk: a corpus is tokenised once into a folder, which is then read through memory maps.

The folder's name is a hash of the text, the tokenizer and the split: an unchanged corpus is found at once, and one
changed byte gives another folder. It is built under a temporary name and renamed at the end, so a store that exists is
complete.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptjax.atomic_io import write_atomic
from gptjax.config import DataConfig
from gptjax.data import corpus, examples, tokenizer
from gptjax.data.examples import Example, Split, class_labels, holds_examples, token_classes
from gptjax.data.splits import SplitText, example_streams, source_names, text_streams
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.tokenizer_choice import make_tokenizer, tokenizer_key
from gptjax.errors import DataError

FORMAT_VERSION = 1
CHUNK_CHARS = 1 << 20  # characters that are encoded in one call
CHECKED_AT_OPEN = 1 << 28  # tokens of a stream whose ids are checked at once; the others are checked when read
FILE_NAMES: dict[Split, str] = {"train": "train", "validation": "val"}


@dataclass(frozen=True)
class Stream:
    """The tokens of one source, its documents concatenated."""

    name: str
    ids: np.ndarray  # uint16 or uint32 [tokens], memory-mapped
    document_starts: np.ndarray  # int64 [documents]
    loss_mask: np.ndarray | None = None  # bool [tokens], memory-mapped: tokens of answers; None: plain text
    origins: Path | None = None  # a text file: line by line, the file and row of each example
    classes: np.ndarray | None = None  # int16 [tokens], memory-mapped: the class label at each token; -1: none

    def origin(self, document: int) -> str:
        """File and row of an example."""
        assert self.origins
        return self.origins.read_text().split("\n")[document]


@dataclass(frozen=True)
class Store:
    """A tokenised corpus: one training stream for each source, and the validation streams."""

    folder: Path
    key: str  # hash of everything that decides the tokens
    tokenizer: Tokenizer
    train: tuple[Stream, ...]
    validation: tuple[Stream, ...]


def cache_folder() -> Path:
    """The folder of stores and compiled programs: $GPTJAX_CACHE, or ~/.cache/gptjax."""
    return Path(os.environ.get("GPTJAX_CACHE", "~/.cache/gptjax")).expanduser()


def open_store(data: DataConfig, init: Tokenizer | None = None) -> Store:
    """The tokens of a corpus, built if there is no store yet; `init`: the tokenizer that "init" stands for.

    Raises `DataError` for text that cannot be read or represented.
    """
    key = _key(data, init)
    folder = cache_folder() / "stores" / key
    if not (folder / "store.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = folder.with_name(f"building-{key}.lock")
        with path.open("w") as lock:  # of several runs that need the store, one builds it
            with contextlib.suppress(OSError):  # without flock in the file system, each builds its own
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "store.json").exists():
                _build(data, folder, init)
            path.unlink(missing_ok=True)  # whoever waits for the lock will find the store
    return _load(data, folder)


def find_store(key: str, data: DataConfig) -> Store | None:
    """The store with this key, if it is in the cache; it does not need the corpus."""
    folder = cache_folder() / "stores" / key
    return _load(data, folder) if (folder / "store.json").exists() else None


def _key(data: DataConfig, init: Tokenizer | None = None) -> str:
    """A hash of everything that decides the tokens: the bytes of the text, the tokenizer and the split."""
    classes = class_labels(data)
    fingerprint = examples.fingerprint if holds_examples(data) else corpus.fingerprint
    parts = {
        "format": FORMAT_VERSION,
        "sources": [fingerprint(source, data) for source in source_names(data.source)],
        "validation": [fingerprint(source, data) for source in source_names(data.val_source)],
        "split": [data.split, data.val_fraction] if data.val_source is None else None,
        "tokenizer": tokenizer_key(data, init),
    }
    if classes:
        parts["classes"] = classes
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _build(data: DataConfig, folder: Path, init: Tokenizer | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-", ignore_cleanup_errors=True) as building:
        scratch = Path(building) / folder.name
        scratch.mkdir()
        made = make_tokenizer(data, init)
        if made.caveat:
            print(f"tokenizer: {made.caveat}", file=sys.stderr)
        (scratch / "tokenizer").mkdir()
        made.save(scratch / "tokenizer")
        if holds_examples(data):
            classes = class_labels(data)
            streams = enumerate(example_streams(data))
            lengths = [_write_examples(scratch / f"{i}", made, splits, classes) for i, splits in streams]
        else:
            lengths = [_write_texts(scratch / f"{i}", made, texts) for i, texts in enumerate(text_streams(data))]
        write_atomic(scratch / "store.json", json.dumps({"format": FORMAT_VERSION, "lengths": lengths}))
        try:
            scratch.rename(folder)
        except OSError:  # another process was first, with the same content
            if not (folder / "store.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                scratch.rename(folder)


def _write_examples(
    prefix: Path, tokenizer: Tokenizer, splits: dict[Split, Iterator[Example]], classes: tuple[str, ...]
) -> dict[str, int]:
    """Writes PREFIX.train.* and PREFIX.val.*: what `_write_texts` writes, the loss mask, and the origins.

    An answer ends with `eos_id`, which is a target too. With `classes` there is no `eos_id`: the targets are labels.
    """
    lengths = {}
    for split, name in FILE_NAMES.items():
        ids, loss_mask, labels, starts, origins = [], [], [], [], []
        length = 0
        for example in splits.get(split, ()):
            parts = tokenizer.encode_parts([part.text for part in example.parts])
            if classes:
                labels.append(token_classes(example, parts, classes))
            elif tokenizer.eos_id is not None:
                parts[-1] = np.append(parts[-1], tokenizer.eos_id)
            starts.append(length)
            length += sum(map(len, parts))
            ids += parts
            loss_mask += [np.full(len(own), part.is_target) for own, part in zip(parts, example.parts, strict=True)]
            origins.append(example.where)
        lengths[name] = length
        empty = [np.zeros(0, np.int32)]
        contents: dict[str, str | bytes] = {
            "tokens": np.concatenate(ids or empty).astype(_dtype(tokenizer)).tobytes(),
            "asked": np.concatenate(loss_mask or empty).astype(bool).tobytes(),
            "documents": np.array(starts, np.int64).tobytes(),
            "origins": "\n".join(origins),
        }
        if classes:
            contents["classes"] = np.concatenate(labels or empty).astype(np.int16).tobytes()
        for ending, content in contents.items():
            write_atomic(Path(f"{prefix}.{name}.{ending}"), content)
    return lengths


def _write_texts(prefix: Path, tokenizer: Tokenizer, texts: Iterator[SplitText]) -> dict[str, int]:
    """Writes PREFIX.train.* and PREFIX.val.*: raw token ids, and where the documents start. Returns the lengths."""
    dtype = _dtype(tokenizer)
    names = tuple(FILE_NAMES.values())
    starts: dict[str, list[int]] = {name: [] for name in names}
    lengths = dict.fromkeys(names, 0)
    with contextlib.ExitStack() as stack:
        outputs = {name: stack.enter_context(open(f"{prefix}.{name}.tokens", "wb")) for name in names}
        for is_train, text, ends_document in texts:
            name = FILE_NAMES["train" if is_train else "validation"]
            starts[name].append(lengths[name])
            for chunk in text_chunks(text, CHUNK_CHARS):
                ids = tokenizer.encode(chunk)
                outputs[name].write(ids.astype(dtype).tobytes())
                lengths[name] += len(ids)
            if ends_document and tokenizer.eos_id is not None:
                outputs[name].write(np.array([tokenizer.eos_id], dtype).tobytes())
                lengths[name] += 1
        for output in outputs.values():
            output.flush()
            os.fsync(output.fileno())
    for name in names:
        write_atomic(Path(f"{prefix}.{name}.documents"), np.array(starts[name], np.int64).tobytes())
    return lengths


def _dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def text_chunks(text: str, size: int) -> Iterator[str]:
    """Cuts a text into parts of about `size` characters at places that no token spans, whatever the tokenizer.

    Such a place is before a line break that follows a visible character: no token joins a word to white space after it.
    """
    start = 0
    while len(text) - start > size:
        end = text.find("\n", start + size)
        while end > 0 and text[end - 1].isspace():
            end = text.find("\n", end + 1)
        if end < 0:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def check_ids(ids: np.ndarray, vocab_size: int | None, where: Path) -> None:
    """Raises `DataError` for an id outside the vocabulary, if its size is known: the file is not what was written."""
    if vocab_size and ids.size and (largest := int(ids.max())) >= vocab_size:
        raise DataError(
            f"{where}: holds the id {largest}, and the vocabulary has only {vocab_size}; the tokens are damaged: "
            "delete the folder, and it will be rebuilt"
        )


def _load(data: DataConfig, folder: Path) -> Store:
    lengths = json.loads((folder / "store.json").read_text())["lengths"]
    loaded = tokenizer.load(folder / "tokenizer")
    with_classes = data.answers == "classes"

    def stream(number: int, source: str, split: Split) -> Stream:
        name = FILE_NAMES[split]
        return _load_stream(folder / f"{number}.{name}", source, lengths[number][name], loaded, with_classes)

    sources = source_names(data.source)
    val_sources = source_names(data.val_source)
    train = [stream(i, source, "train") for i, source in enumerate(sources)]
    first = len(sources) if val_sources else 0
    validation = [stream(first + i, source, "validation") for i, source in enumerate(val_sources or sources)]
    for split, streams, change in [("training", train, "lower"), ("validation", validation, "raise")]:
        if sum(len(s.ids) for s in streams) < 2:
            raise DataError(
                f"data.source = {data.source!r}: no {split} text is left after the split; "
                f"give more text or {change} data.val_fraction"
            )
    return Store(folder, folder.name, loaded, tuple(train), tuple(validation))


def _load_stream(prefix: Path, source: str, length: int, tokenizer: Tokenizer, with_classes: bool) -> Stream:
    """Maps PREFIX.tokens and the files that belong to it."""

    def path(ending: str) -> Path:
        return prefix.with_name(f"{prefix.name}.{ending}")

    def mapped(ending: str, dtype: type) -> np.ndarray:  # an empty file cannot be mapped
        return np.memmap(path(ending), dtype, "r") if path(ending).stat().st_size else np.zeros(0, dtype)

    ids = mapped("tokens", _dtype(tokenizer))
    if len(ids) != length:
        raise DataError(
            f"{path('tokens')}: holds {len(ids)} tokens, not {length}; delete {prefix.parent} to rebuild it"
        )
    check_ids(ids[:CHECKED_AT_OPEN], tokenizer.vocab_size, path("tokens"))
    starts = np.fromfile(path("documents"), np.int64)
    if not path("origins").exists():
        return Stream(source, ids, starts)
    classes = mapped("classes", np.int16) if with_classes else None
    return Stream(source, ids, starts, mapped("asked", bool), path("origins"), classes)
