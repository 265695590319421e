"""The tokenizer that `data.tokenizer` names: made from the corpus, read from files, or that of the initial model."""

import hashlib
import json
import os
from pathlib import Path

from gptjax.config import DataConfig
from gptjax.data import tokenizer
from gptjax.data.splits import all_texts
from gptjax.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer
from gptjax.data.tokenizer.engine import bpe_files
from gptjax.errors import DataError

INIT = "init"  # data.tokenizer = "init": the tokenizer of the model that training starts from


def make_tokenizer(data: DataConfig, init: Tokenizer | None) -> Tokenizer:
    """The tokenizer of a corpus; `init` is what `INIT` stands for. Raises `DataError` if it cannot be made."""
    if data.tokenizer == INIT:
        return _given(init)
    if data.tokenizer == "byte":
        return ByteTokenizer()
    if data.tokenizer == "char":
        characters: set[str] = set()
        num_documents = 0
        for _, text, ends_document in all_texts(data):
            characters.update(text)
            num_documents += ends_document
        return CharTokenizer("".join(sorted(characters)), has_eos=num_documents > 1)
    if data.tokenizer == "sentencepiece":
        training = (text for is_train, text, _ in all_texts(data) if is_train)
        return SentencePieceTokenizer.train(training, data.tokenizer_vocab_size)
    return _saved_tokenizer(data) or BPETokenizer.from_path(_path(data.tokenizer))


def tokenizer_key(data: DataConfig, init: Tokenizer | None) -> list[object]:
    """Everything that decides the tokenizer, besides the corpus: part of the key of a store."""
    if data.tokenizer == INIT:
        return [INIT, _content_hash(_given(init))]
    if data.tokenizer == "sentencepiece":
        return [data.tokenizer, data.tokenizer_vocab_size]
    if data.tokenizer in ("byte", "char"):
        return [data.tokenizer]
    if saved := _saved_tokenizer(data):
        return ["kept", _content_hash(saved)]
    return ["bpe", *(hashlib.sha256(file.read_bytes()).hexdigest() for file in bpe_files(_path(data.tokenizer)))]


def _given(init: Tokenizer | None) -> Tokenizer:
    if init is None:
        raise DataError(
            "data.tokenizer = 'init': needs the model that training starts from; set init, or name another tokenizer"
        )
    return init


def _saved_tokenizer(data: DataConfig) -> Tokenizer | None:
    """The tokenizer of a run folder (RUN/tokenizer), unless it is a BPE, whose files other libraries write as well."""
    folder = _path(data.tokenizer)
    if not (folder / tokenizer.DESCRIPTION).is_file():
        return None
    saved = tokenizer.load(folder)
    return None if saved.kind == "bpe" else saved


def _content_hash(given: Tokenizer) -> str:
    """A hash of everything that `Tokenizer.save` writes and that decides ids."""
    described = {name: value for name, value in given.description().items() if name != "roles"}
    digest = hashlib.sha256(json.dumps([given.kind, described]).encode())
    for name, content in sorted(given.files().items()):
        digest.update(name.encode() + content)
    return digest.hexdigest()


def _path(name: str) -> Path:
    return Path(os.path.expandvars(name)).expanduser()
