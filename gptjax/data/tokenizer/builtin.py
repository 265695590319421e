"""The tokenizers that need no files: bytes, characters, and SentencePiece trained on the corpus."""

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gptjax.data.tokenizer.base import SPACE, Ids, Tokenizer, utf8
from gptjax.errors import DataError


class ByteTokenizer(Tokenizer):
    """256 bytes and an end-of-text token."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__([bytes([i]) for i in range(256)] + [b""], eos_id=256)

    def encode(self, text: str) -> Ids:
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)


class CharTokenizer(Tokenizer):
    """One id for each character of the corpus. Raises `DataError` for any other character."""

    kind = "char"

    def __init__(self, characters: str, has_eos: bool):
        self.characters = characters
        id_to_bytes = [c.encode() for c in characters] + [b""] * has_eos
        super().__init__(id_to_bytes, eos_id=len(characters) if has_eos else None)
        self.caveat = f"knows the {len(characters)} characters of its corpus and refuses any other"
        codes = np.array([ord(c) for c in characters])
        self._ids = np.full(max(codes, default=0) + 2, -1, np.int32)  # the last entry is for all characters above
        self._ids[codes] = np.arange(len(characters), dtype=np.int32)

    def description(self) -> dict[str, Any]:
        return {"characters": self.characters, "has_end_of_text": self.eos_id is not None}

    def encode(self, text: str) -> Ids:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        if len(unknown := np.flatnonzero(ids < 0)):
            where = int(unknown[0])
            raise DataError(
                f"{text[where]!r} at character {where} is none of the {len(self.characters)} characters that the char "
                "tokenizer was made from; use data.tokenizer = 'byte' for any text"
            )
        return ids


class SentencePieceTokenizer(Tokenizer):
    """A unigram model trained on the corpus (Kudo 2018), with byte fallback."""

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        import sentencepiece

        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        count = self._processor.get_piece_size()
        names = [self._processor.id_to_piece(i) for i in range(count)]
        super().__init__([self._bytes_of(i, name) for i, name in enumerate(names)], names.index("<|endoftext|>"))
        # A literal U+2581 in the text would be decoded as a space, so it is encoded byte by byte.
        self._space_ids = np.array([names.index(f"<0x{byte:02X}>") for byte in SPACE.encode()], np.int32)

    def _bytes_of(self, i: int, name: str) -> bytes:
        if self._processor.is_control(i) or self._processor.is_unknown(i):
            return b""
        if self._processor.is_byte(i):
            return bytes([int(name[3:5], 16)])
        return name.replace(SPACE, " ").encode()

    def files(self) -> dict[str, bytes]:
        return {"sentencepiece.model": self.model}

    def encode(self, text: str) -> Ids:
        utf8(text)
        parts: list[Ids] = []
        for i, part in enumerate(text.split(SPACE)):
            parts += [self._space_ids] * (i > 0) + [np.array(self._processor.encode(part), np.int32)]
        return np.concatenate(parts)

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "SentencePieceTokenizer":
        """Trains on the first 100 million characters, without normalisation; in one thread, to be reproducible."""
        import sentencepiece

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_training_lines(documents, 100_000_000),
                model_writer=model,
                vocab_size=vocab_size,
                model_type="unigram",
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                byte_fallback=True,
                split_digits=True,
                character_coverage=0.9995,
                hard_vocab_limit=False,
                user_defined_symbols=["\n"],
                control_symbols=["<|endoftext|>"],
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                unk_id=0,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as e:
            why = str(e).strip().splitlines()[-1]
            required = re.search(r"required_chars\. \d+ vs (\d+)", why)
            size = f"this text needs at least {required[1]} pieces" if required else f"{why}; choose another size"
            raise DataError(
                f"data.tokenizer_vocab_size = {vocab_size}: sentencepiece cannot train that many pieces on this text; "
                f"{size}, or data.tokenizer = 'byte'"
            ) from None
        return cls(model.getvalue())


MAX_LINE = 4192  # bytes; SentencePiece skips longer lines (its `max_sentence_length`)
SENTENCE_END = re.compile(r"[ \u3002\uff01\uff1f]")  # a space, or the full stop and marks of Chinese


def _training_lines(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Lines of at most 2,000 characters and `MAX_LINE` bytes, without the characters that SentencePiece reserves.

    Those are U+2581 and NUL.
    """
    for document in documents:
        document = document[:limit]
        limit -= len(document)
        if not document:
            return
        for line in document.replace(SPACE, "\n").replace("\0", "\n").split("\n"):
            for i in range(0, len(line), 2000):
                yield from _within_bytes(line[i : i + 2000])


def _within_bytes(line: str) -> Iterator[str]:
    """The line in pieces of at most `MAX_LINE` bytes, cut after the end of a sentence if the second half has one."""
    while len(encoded := line.encode()) > MAX_LINE:
        cut = len(encoded[:MAX_LINE].decode(errors="ignore"))
        ends = [match.end() for match in SENTENCE_END.finditer(line, cut // 2, cut)]
        if ends:
            cut = ends[-1]
        yield line[:cut]
        line = line[cut:]
    yield line
