"""What all tokenizers share. Every id stands for known bytes, so decoding joins bytes for every kind."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gptjax.errors import DataError

Ids = np.ndarray  # int32 [number of tokens]
FORMAT_VERSION = 1
DESCRIPTION = "gptjax_tokenizer.json"
SPACE = "▁"  # SentencePiece's symbol for a space
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # its symbol for a byte that no piece covers


class Tokenizer:
    """The interface of all kinds. `id_to_bytes[i]` are the bytes of id i; `eos_id` ends a document (None: nothing)."""

    kind: ClassVar[str]
    caveat: str = ""  # what it cannot represent; printed when a corpus is tokenised
    bos_id: int | None = None  # the token before every text in training; None: no token
    adds_prefix_space: bool = False  # encoding puts a space before a text; decoding from the start drops it
    special_tokens: dict[str, int] = {}  # noqa: RUF012 (replaced, never mutated); text -> id
    # of an imported tokenizer: the tokens that have a role, such as bos_token, and how to pad (see roles.py)
    roles: dict[str, Any] = {}  # noqa: RUF012 (replaced, never mutated)

    def __init__(self, id_to_bytes: list[bytes], eos_id: int | None):
        self.id_to_bytes = id_to_bytes
        self.eos_id = eos_id

    @property
    def vocab_size(self) -> int:
        return len(self.id_to_bytes)

    def encode(self, text: str) -> Ids:
        """Raises `DataError` for text that cannot be represented, naming the character."""
        raise NotImplementedError

    def encode_special(self, text: str) -> Ids:
        """`encode`, but special tokens in the text become their ids: for chat templates, never for a user's text."""
        return self.encode(text)

    def encode_prompt(self, text: str) -> Ids:
        """`encode`, with `bos_id` before the ids if the model was trained with one."""
        ids = self.encode(text)
        return ids if self.bos_id is None else np.concatenate([np.array([self.bos_id], np.int32), ids])

    def encode_parts(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of consecutive parts of one text, beginning as in `encode_prompt`. No token spans two parts."""
        if not self.adds_prefix_space:
            return [self.encode_prompt(texts[0]), *map(self.encode, texts[1:])]
        prefixes = [self.encode_prompt("".join(texts[: i + 1])) for i in range(len(texts))]
        return [ids[len(before) :] for before, ids in zip([prefixes[0][:0], *prefixes], prefixes, strict=False)]

    def files(self) -> dict[str, bytes]:
        """The files that `load` needs besides the description: file name -> content."""
        return {}

    def description(self) -> dict[str, Any]:
        """The values that `load` needs in the description."""
        return {}

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.id_to_bytes[i] for i in ids)

    def decode(self, ids: Iterable[int], from_start: bool = False) -> str:
        """The text of any ids; bytes that are not UTF-8 (a sample may end inside a character) become U+FFFD.

        `from_start`: the ids begin a text, so the space that `adds_prefix_space` put there is dropped.
        """
        text = self.decode_bytes(ids).decode(errors="replace")
        return text.removeprefix(" ") if from_start and self.adds_prefix_space else text

    def decode_stream(self, ids: Iterable[int], from_start: bool = False) -> Iterator[str]:
        """The same text in parts, one for each id; no part ends inside a character."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        drop = from_start and self.adds_prefix_space
        for i in ids:
            part = decoder.decode(self.id_to_bytes[i])
            yield part.removeprefix(" ") if drop else part
            drop = drop and not part
        yield decoder.decode(b"", final=True)

    def save(self, folder: Path) -> None:
        """Writes what `load` needs into an existing folder."""
        text = json.dumps({"format": FORMAT_VERSION, "kind": self.kind} | self.description(), ensure_ascii=False)
        (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        for name, content in self.files().items():
            (folder / name).write_bytes(content)


def utf8(text: str) -> bytes:
    """Raises `DataError` for text that has no UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise DataError(f"{text[e.start]!r} at character {e.start} is half of a surrogate pair, not text") from None
