"""Tokens on disk: a corpus is tokenised once into a folder that is read through memory maps ever after.

The folder's name is a hash of the text, the tokenizer and the split, so a second run finds it at once and a changed
byte finds another. It is built under a temporary name and renamed when it is complete: a store that can
be seen is whole.
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
from gptjax.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from gptjax.data.tokenizer.engine import bpe_files
from gptjax.errors import DataError

FORMAT_VERSION = 1
INIT = "init"  # in the place of a tokenizer: that of the model that training starts from
CHUNK_CHARS = 1 << 20  # characters that are encoded at once
CHECKED_AT_OPEN = 1 << 28  # tokens of a stream that are looked through at the start; the others when they are read


@dataclass(frozen=True)
class Stream:
    """The tokens of one source, one document after the other."""

    name: str
    ids: np.ndarray  # uint16 or uint32 [tokens], memory-mapped
    document_starts: np.ndarray  # int64 [documents]: where each begins
    loss_mask: np.ndarray | None = None  # bool [tokens], memory-mapped: of examples, what is to be learnt
    origins: Path | None = None  # of examples: a text file, line by line the file and line that each is from
    classes: np.ndarray | None = None  # int16 [tokens], memory-mapped: of labels, the one told at each; -1: none

    def origin(self, document: int) -> str:
        """File and row of an example."""
        assert self.origins
        return self.origins.read_text().split("\n")[document]


@dataclass(frozen=True)
class Store:
    """A tokenised corpus: one training stream for each source, and the validation text."""

    folder: Path
    key: str  # hash of everything that decides the tokens
    tokenizer: Tokenizer
    train: tuple[Stream, ...]
    validation: tuple[Stream, ...]


def cache_folder() -> Path:
    """Where stores and compiled programs are kept: $GPTJAX_CACHE, or ~/.cache/gptjax."""
    return Path(os.environ.get("GPTJAX_CACHE", "~/.cache/gptjax")).expanduser()


def open_store(data: DataConfig, init: Tokenizer | None = None) -> Store:
    """The tokens of a corpus, built now if this is the first time; `init`: the tokenizer that "init" stands for.

    Raises `DataError` for text that cannot be read or represented.
    """
    key = _key(data, init)
    folder = cache_folder() / "stores" / key
    if not (folder / "store.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = folder.with_name(f"building-{key}.lock")
        with path.open("w") as lock:  # of several runs that need it, one builds it for all
            with contextlib.suppress(OSError):  # where the file system has no flock, each builds its own
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "store.json").exists():
                _build(data, folder, init)
            path.unlink(missing_ok=True)  # who waits for it still sees the store
    return _load(data, folder)


def find_store(key: str, data: DataConfig) -> Store | None:
    """The store of this key, if it is in the cache; the corpus itself is not needed then."""
    folder = cache_folder() / "stores" / key
    return _load(data, folder) if (folder / "store.json").exists() else None


def _key(data: DataConfig, init: Tokenizer | None = None) -> str:
    """Everything that decides the tokens: the bytes of the text, the tokenizer and the split."""
    classes = class_labels(data)
    fingerprint = examples.fingerprint if holds_examples(data) else corpus.fingerprint
    parts = {
        "format": FORMAT_VERSION,
        "sources": [fingerprint(source, data) for source in source_names(data.source)],
        "validation": [fingerprint(source, data) for source in source_names(data.val_source)],
        "split": [data.split, data.val_fraction] if data.val_source is None else None,
        "tokenizer": _tokenizer_key(data, init),
    }
    parts |= {"classes": classes} if classes else {}
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _tokenizer_key(data: DataConfig, init: Tokenizer | None) -> list[object]:
    if data.tokenizer == INIT:
        assert init, "whoever opens the store knows what the run starts from"
        return [INIT, _content(init)]
    if data.tokenizer == "sentencepiece":
        return [data.tokenizer, data.tokenizer_vocab_size]
    if data.tokenizer in ("byte", "char"):
        return [data.tokenizer]
    if kept := _kept_tokenizer(data):
        return ["kept", _content(kept)]
    return ["bpe", *(hashlib.sha256(file.read_bytes()).hexdigest() for file in bpe_files(_path(data.tokenizer)))]


def _content(tokens: Tokenizer) -> str:
    """A hash of all that a tokenizer is."""
    content = hashlib.sha256(json.dumps([tokens.kind, tokens.description()]).encode())
    for name, data_of_file in sorted(tokens.files().items()):
        content.update(name.encode() + data_of_file)
    return content.hexdigest()


def _path(name: str) -> Path:
    return Path(os.path.expandvars(name)).expanduser()


def source_names(source: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """One source or several, always as a tuple."""
    return () if source is None else (source,) if isinstance(source, str) else source


def _build(data: DataConfig, folder: Path, init: Tokenizer | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-", ignore_cleanup_errors=True) as building:
        scratch = Path(building) / folder.name
        scratch.mkdir()
        tokens = init if data.tokenizer == INIT and init else _make_tokenizer(data)
        if tokens.caveat:
            print(f"tokenizer: {tokens.caveat}", file=sys.stderr)
        (scratch / "tokenizer").mkdir()
        tokens.save(scratch / "tokenizer")
        if holds_examples(data):
            classes = class_labels(data)
            every = enumerate(_examples_by_side(data))
            lengths = [_write_examples(scratch / f"{i}", tokens, sides, classes) for i, sides in every]
        else:
            parts = [_parts(source, data) for source in source_names(data.source)]
            parts += [
                ((False, text, True) for text in corpus.iter_documents(source, data))
                for source in source_names(data.val_source)
            ]
            lengths = [_write(scratch / f"{i}", tokens, stream) for i, stream in enumerate(parts)]
        description = {"format": FORMAT_VERSION, "lengths": lengths}
        write_atomic(scratch / "store.json", json.dumps(description))
        try:
            scratch.rename(folder)
        except OSError:  # another process was first, with the same content
            if not (folder / "store.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                scratch.rename(folder)


class _Split:
    """Which side a text goes to: (is training, text, is the end of a document)."""

    def __init__(self, data: DataConfig, source: str):
        self.by_document = data.split == "document"
        self.fraction = data.val_fraction if data.val_source is None else 0.0
        self.cut = 0
        if self.fraction and not self.by_document:
            total = sum(len(text) for text in corpus.iter_documents(source, data))
            self.cut = int(total * (1 - self.fraction))
        self.seen = 0

    def __call__(self, text: str) -> Iterator[tuple[bool, str, bool]]:
        if not self.fraction:
            yield True, text, True
        elif self.by_document:
            share = int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8]) / 2**64
            yield share >= self.fraction, text, True
        else:
            train = min(max(self.cut - self.seen, 0), len(text))
            self.seen += len(text)
            if train:
                yield True, text[:train], train == len(text)
            if train < len(text):
                yield False, text[train:], True


def _parts(source: str, data: DataConfig) -> Iterator[tuple[bool, str, bool]]:
    split = _Split(data, source)
    for text in corpus.iter_documents(source, data):
        yield from split(text)


def _examples_by_side(data: DataConfig) -> Iterator[dict[Split, Iterator[Example]]]:
    """The examples of every source: all for training where `val_source` has examples of its own."""
    for source in source_names(data.source):
        sides: tuple[Split, ...] = ("train",) if data.val_source else ("train", "validation")
        yield {side: examples.load_examples(source, data, side) for side in sides}
    for source in source_names(data.val_source):
        yield {"validation": examples.load_examples(source, data, "validation")}


def _make_tokenizer(data: DataConfig) -> Tokenizer:
    if data.tokenizer == "byte":
        return ByteTokenizer()
    if data.tokenizer == "char":
        characters: set[str] = set()
        documents = 0
        for _, text, ends in _texts(data):
            characters.update(text)
            documents += ends
        return CharTokenizer("".join(sorted(characters)), has_eos=documents > 1)
    if data.tokenizer == "sentencepiece":
        training = (text for train, text, _ in _texts(data) if train)
        return SentencePieceTokenizer.train(training, data.tokenizer_vocab_size)
    return _kept_tokenizer(data) or BPETokenizer.from_path(_path(data.tokenizer))


def _kept_tokenizer(data: DataConfig) -> Tokenizer | None:
    """That of a run folder, RUN/tokenizer, where it is of another kind than those that libraries write."""
    folder = _path(data.tokenizer)
    kept = tokenizer.load(folder) if (folder / tokenizer.DESCRIPTION).is_file() else None
    return kept if kept and kept.kind != "bpe" else None


def _texts(data: DataConfig) -> Iterator[tuple[bool, str, bool]]:
    """All text, for a tokenizer that is made of it: (is training, text, is the end of a document)."""
    if holds_examples(data):
        for sides in _examples_by_side(data):
            for side, found in sides.items():
                yield from ((side == "train", "".join(part.text for part in e.parts), True) for e in found)
        return
    for source in source_names(data.source):
        yield from _parts(source, data)
    for source in source_names(data.val_source):
        yield from ((False, text, True) for text in corpus.iter_documents(source, data))


def _write_examples(
    prefix: Path, tokens: Tokenizer, sides: dict[Split, Iterator[Example]], classes: tuple[str, ...]
) -> dict[str, int]:
    """Writes PREFIX.train.* and PREFIX.val.*: what `_write` does, what is asked, and where all is from.

    An answer ends with `eos_id`, which is asked for with it; where classes are told, the text is all there is.
    """
    lengths = {}
    names: dict[Split, str] = {"train": "train", "validation": "val"}
    for side, name in names.items():
        ids, asked, told, starts, origins, total = [], [], [], [], [], 0
        for example in sides.get(side, ()):
            parts = tokens.encode_parts([part.text for part in example.parts])
            if classes:
                told.append(token_classes(example, parts, classes))
            elif tokens.eos_id is not None:
                parts[-1] = np.append(parts[-1], tokens.eos_id)
            starts.append(total)
            total += sum(map(len, parts))
            ids += parts
            asked += [np.full(len(own), part.is_target) for own, part in zip(parts, example.parts, strict=True)]
            origins.append(example.where)
        lengths[name] = total
        nothing = [np.zeros(0, np.int32)]
        contents: dict[str, str | bytes] = {
            "tokens": np.concatenate(ids or nothing).astype(_dtype(tokens)).tobytes(),
            "asked": np.concatenate(asked or nothing).astype(bool).tobytes(),
            "documents": np.array(starts, np.int64).tobytes(),
            "origins": "\n".join(origins),
        }
        contents |= {"classes": np.concatenate(told or nothing).astype(np.int16).tobytes()} if classes else {}
        for ending, content in contents.items():
            write_atomic(Path(f"{prefix}.{name}.{ending}"), content)
    return lengths


def _write(prefix: Path, tokens: Tokenizer, parts: Iterator[tuple[bool, str, bool]]) -> dict[str, int]:
    """Writes PREFIX.train.* and PREFIX.val.*: raw token ids, and where the documents begin. Returns the lengths."""
    dtype = _dtype(tokens)
    sides = {True: "train", False: "val"}
    starts: dict[bool, list[int]] = {True: [], False: []}
    lengths = {True: 0, False: 0}
    with contextlib.ExitStack() as stack:
        outputs = {side: stack.enter_context(open(f"{prefix}.{name}.tokens", "wb")) for side, name in sides.items()}
        for train, text, ends in parts:
            starts[train].append(lengths[train])
            for chunk in text_chunks(text, CHUNK_CHARS):
                ids = tokens.encode(chunk)
                outputs[train].write(ids.astype(dtype).tobytes())
                lengths[train] += len(ids)
            if ends and tokens.eos_id is not None:
                outputs[train].write(np.array([tokens.eos_id], dtype).tobytes())
                lengths[train] += 1
        for output in outputs.values():
            output.flush()
            os.fsync(output.fileno())
    for side, name in sides.items():
        write_atomic(Path(f"{prefix}.{name}.documents"), np.array(starts[side], np.int64).tobytes())
    return {name: lengths[side] for side, name in sides.items()}


def _dtype(tokens: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokens.vocab_size <= 1 << 16 else np.uint32


def text_chunks(text: str, size: int) -> Iterator[str]:
    """Cuts a text into parts of about `size` characters where no piece of any tokenizer spans the cut.

    That is before a line break that follows a visible character: words do not run into white space.
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
    """Raises `DataError` for an id outside the vocabulary, where that is known: the file is not what was written."""
    if vocab_size and ids.size and (largest := int(ids.max())) >= vocab_size:
        raise DataError(
            f"{where}: holds the id {largest}, and the vocabulary has only {vocab_size}; the tokens are damaged: "
            "delete the folder, to have it rebuilt"
        )


def _load(data: DataConfig, folder: Path) -> Store:
    lengths = json.loads((folder / "store.json").read_text())["lengths"]
    tokens = tokenizer.load(folder / "tokenizer")

    def stream(number: int, name: str, side: str) -> Stream:
        path = folder / f"{number}.{side}.tokens"
        ids = np.memmap(path, _dtype(tokens), "r") if path.stat().st_size else np.zeros(0, _dtype(tokens))
        if len(ids) != lengths[number][side]:
            raise DataError(
                f"{path}: holds {len(ids)} tokens, not {lengths[number][side]}; delete {folder} to rebuild it"
            )
        check_ids(ids[:CHECKED_AT_OPEN], tokens.vocab_size, path)
        documents = np.fromfile(folder / f"{number}.{side}.documents", np.int64)
        if not (origins := folder / f"{number}.{side}.origins").exists():
            return Stream(name, ids, documents)

        def beside(ending: str, dtype: type) -> np.ndarray:
            return np.memmap(origins.with_suffix(ending), dtype, "r") if len(ids) else np.zeros(0, dtype)

        classes = beside(".classes", np.int16) if data.answers == "classes" else None
        return Stream(name, ids, documents, beside(".asked", bool), origins, classes)

    sources, apart = source_names(data.source), source_names(data.val_source)
    train = [stream(i, name, "train") for i, name in enumerate(sources)]
    first = len(sources) if apart else 0
    validation = [stream(first + i, name, "val") for i, name in enumerate(apart or sources)]
    for side, streams, mend in [("training", train, "lower"), ("validation", validation, "raise")]:
        if sum(len(s.ids) for s in streams) < 2:
            raise DataError(
                f"data.source = {data.source!r}: no {side} text is left after the split; "
                f"give more text or {mend} data.val_fraction"
            )
    return Store(folder, folder.name, tokens, tuple(train), tuple(validation))
