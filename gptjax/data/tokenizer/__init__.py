"""Text to ids and back, exactly: every id stands for known bytes.

Kinds: bytes, characters, SentencePiece trained on the corpus, byte-level BPE (GPT-2 and its successors), and two for
the weights of other projects: SentencePiece in a tokenizer.json (Llama 2, Gemma) and WordPiece (BERT).
Text that looks like a special token is ordinary text. Only the store adds `eos_id`, and only `encode_prompt` adds
`bos_id`. The module `huggingface` reads and writes Hugging Face folders.
"""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax.atomic_io import LARGEST_TEXT, read_json
from gptjax.data.tokenizer.base import DESCRIPTION, FORMAT_VERSION, Tokenizer
from gptjax.data.tokenizer.builtin import ByteTokenizer, CharTokenizer, SentencePieceTokenizer
from gptjax.data.tokenizer.engine import (
    BPETokenizer,
    EngineTokenizer,
    PieceTokenizer,
    WordPieceTokenizer,
)
from gptjax.data.tokenizer.roles import token_roles
from gptjax.errors import DataError

__all__ = [
    "DESCRIPTION",
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "EngineTokenizer",
    "PieceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "WordPieceTokenizer",
    "load",
]


def _engine_kind(kind: type[EngineTokenizer]) -> Callable[[Path, dict[str, Any]], Tokenizer]:
    def make(folder: Path, spec: dict[str, Any]) -> Tokenizer:
        text = _plain_bytes(folder / "tokenizer.json").decode()
        tokenizer = kind(text, spec.get("begin_of_text"), spec.get("end_of_text"))  # missing in older descriptions
        tokenizer.roles = token_roles(spec.get("roles", {}), tokenizer.special_tokens)
        return tokenizer

    return make


KINDS: dict[str, Callable[[Path, dict[str, Any]], Tokenizer]] = {
    "byte": lambda folder, spec: ByteTokenizer(),
    "char": lambda folder, spec: CharTokenizer(spec["characters"], spec["has_end_of_text"]),
    "sentencepiece": lambda folder, spec: SentencePieceTokenizer(_plain_bytes(folder / "sentencepiece.model")),
    **{kind.kind: _engine_kind(kind) for kind in (BPETokenizer, PieceTokenizer, WordPieceTokenizer)},
}


def load(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote. Raises `DataError` if there is none that this version can read.

    The folder may be untrusted: links and oversized files are refused.
    """
    try:
        spec = read_json(folder / DESCRIPTION)
        if spec["format"] != FORMAT_VERSION:
            raise ValueError(f"format {spec['format']}, this gptjax reads {FORMAT_VERSION}")
        return KINDS[spec["kind"]](folder, spec)
    except Exception as e:  # the engines have no error class of their own
        raise DataError(f"{folder}: has no tokenizer that can be read ({e})") from None


def _plain_bytes(path: Path) -> bytes:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_TEXT:
        raise DataError(f"{path}: is a link or a device, or has more than {LARGEST_TEXT:,} bytes; it is not read")
    return path.read_bytes()
