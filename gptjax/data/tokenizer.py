"""Text to ids and back, exactly: every id stands for known bytes, so decoding is joining bytes for every kind alike.

Kinds: bytes, characters, SentencePiece trained on the corpus, and byte-level BPE as GPT-2 and its successors use it.
Text that looks like a special token is ordinary text; only the store ever adds `end_of_text`.
"""

import codecs
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gptjax.errors import DataError

Ids = np.ndarray  # int32 [number of tokens]
FORMAT_VERSION = 1
DESCRIPTION = "gptjax_tokenizer.json"
SPACE = "▁"  # how SentencePiece writes a space


class Tokenizer:
    """What all kinds share. `pieces[i]` are the bytes of id i; `end_of_text` closes a document, where there is one."""

    kind: ClassVar[str]
    caveat: str = ""  # what it cannot represent, said when a corpus is tokenised

    def __init__(self, pieces: list[bytes], end_of_text: int | None):
        self.pieces = pieces
        self.end_of_text = end_of_text

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> Ids:
        """Raises `DataError` for text that cannot be represented, naming the character."""
        raise NotImplementedError

    def files(self) -> dict[str, bytes]:
        """What must be kept beside the description to load it again: file name -> content."""
        return {}

    def description(self) -> dict[str, Any]:
        """What must be kept in the description itself."""
        return {}

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.pieces[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of any ids; bytes that are not UTF-8 (a sample may end inside a character) become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The same text in parts, one an id, each part whole characters only."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.pieces[i])
        yield decoder.decode(b"", final=True)

    def save(self, folder: Path) -> None:
        """Writes all that `load` needs into an existing folder."""
        text = json.dumps({"format": FORMAT_VERSION, "kind": self.kind} | self.description(), ensure_ascii=False)
        (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        for name, content in self.files().items():
            (folder / name).write_bytes(content)


class ByteTokenizer(Tokenizer):
    """256 bytes and the end of a text."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__([bytes([i]) for i in range(256)] + [b""], end_of_text=256)

    def encode(self, text: str) -> Ids:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)


class CharTokenizer(Tokenizer):
    """One id for each character that occurs in the corpus; refuses any other."""

    kind = "char"

    def __init__(self, characters: str, has_end_of_text: bool):
        self.characters = characters
        pieces = [c.encode() for c in characters] + [b""] * has_end_of_text
        super().__init__(pieces, end_of_text=len(characters) if has_end_of_text else None)
        self.caveat = f"knows the {len(characters)} characters of its corpus and refuses any other"
        codes = np.array([ord(c) for c in characters])
        self._ids = np.full(max(codes, default=0) + 2, -1, np.int32)  # the last entry stands for all beyond
        self._ids[codes] = np.arange(len(characters), dtype=np.int32)

    def description(self) -> dict[str, Any]:
        return {"characters": self.characters, "has_end_of_text": self.end_of_text is not None}

    def encode(self, text: str) -> Ids:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        if len(unknown := np.flatnonzero(ids < 0)):
            where = int(unknown[0])
            raise DataError(
                f"{text[where]!r} at character {where} is none of the {len(self.characters)} characters that the char "
                "tokenizer knows; use data.tokenizer = 'byte' for any text"
            )
        return ids


class SentencePieceTokenizer(Tokenizer):
    """Unigram pieces learned from the corpus (Kudo 2018), with bytes for whatever no piece covers."""

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        import sentencepiece

        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        count = self._processor.get_piece_size()
        names = [self._processor.id_to_piece(i) for i in range(count)]
        pieces = [
            b""
            if self._processor.is_control(i) or self._processor.is_unknown(i)
            else bytes([int(name[3:5], 16)])
            if self._processor.is_byte(i)
            else name.replace(SPACE, " ").encode()
            for i, name in enumerate(names)
        ]
        super().__init__(pieces, end_of_text=names.index("<|endoftext|>"))
        # A literal U+2581 in the text would come back as a space: it is spelt in bytes instead.
        self._spelt = np.array([names.index(f"<0x{byte:02X}>") for byte in SPACE.encode()], np.int32)

    def files(self) -> dict[str, bytes]:
        return {"sentencepiece.model": self.model}

    def encode(self, text: str) -> Ids:
        _utf8(text)
        parts: list[Ids] = []
        for i, part in enumerate(text.split(SPACE)):
            parts += [self._spelt] * (i > 0) + [np.array(self._processor.encode(part), np.int32)]
        return np.concatenate(parts)

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "SentencePieceTokenizer":
        """Learns from the first 100 million characters, with settings that lose nothing; one thread, so same bits."""
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
            raise DataError(
                f"data.tokenizer_vocab_size = {vocab_size}: sentencepiece cannot learn that many pieces from this text "
                f"({str(e).strip().splitlines()[-1]}); choose another size (above 300), or data.tokenizer = 'byte'"
            ) from None
        return cls(model.getvalue())


class BPETokenizer(Tokenizer):
    """Byte-level BPE from a `tokenizer.json`, or from GPT-2's vocab.json and merges.txt made into one."""

    kind = "bpe"

    def __init__(self, tokenizer_json: str):
        import tokenizers

        self.tokenizer_json = tokenizer_json
        spec = json.loads(tokenizer_json)
        if not _mentions(spec.get("decoder"), "ByteLevel"):
            raise DataError("tokenizer.json: its decoder is not ByteLevel, so its ids do not stand for known bytes")
        if spec.get("normalizer"):
            self.caveat = f"normalises text ({spec['normalizer']['type']}) before it encodes it"
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # the words of a special token in a text are text
        special = {t["id"] for t in spec.get("added_tokens", []) if t["special"]}
        ends = [self._tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|end_of_text|>", "</s>")]
        end_of_text = next((i for i in ends if i is not None), None)
        byte_of = {c: b for b, c in _byte_characters().items()}
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        if missing := sorted(byte_of[c] for c in byte_of.keys() - vocab.keys()):
            self.caveat = f"has no piece for {len(missing)} of the 256 bytes and drops them: {bytes(missing)!r}"
        pieces = [b""] * (max(vocab.values()) + 1)
        for piece, i in vocab.items():
            if i not in special and i != end_of_text:
                pieces[i] = bytes(byte_of[c] for c in piece) if all(c in byte_of for c in piece) else piece.encode()
        super().__init__(pieces, end_of_text)
        probe = "a  b\n c"
        if not self.caveat and (back := self.decode(self.encode(probe))) != probe:
            self.caveat = f"does not give texts back as they were: {probe!r} becomes {back!r}"

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.tokenizer_json.encode()}

    def encode(self, text: str) -> Ids:
        _utf8(text)
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    @classmethod
    def from_path(cls, path: Path) -> "BPETokenizer":
        """Raises `DataError` where the files are missing or hold no byte-level BPE."""
        files = bpe_files(path)
        try:
            return cls(files[0].read_text(encoding="utf-8") if len(files) == 1 else _gpt2_json(*files))
        except DataError:
            raise
        except Exception as e:  # the engine raises whatever it likes
            raise DataError(f"data.tokenizer = {str(path)!r}: holds no byte-level BPE ({e})") from None


def bpe_files(path: Path) -> list[Path]:
    """A tokenizer.json; or vocab.json and merges.txt; at a path that is the file or the folder of it."""
    for choice in [[path], [path / "tokenizer.json"], [path / "vocab.json", path / "merges.txt"]]:
        if all(file.is_file() for file in choice):
            return choice
    raise DataError(
        f"data.tokenizer = {str(path)!r}: neither a tokenizer.json nor a folder with vocab.json and merges.txt; "
        "byte, char and sentencepiece need no file"
    )


KINDS: dict[str, Callable[[Path, dict[str, Any]], Tokenizer]] = {
    "byte": lambda folder, spec: ByteTokenizer(),
    "char": lambda folder, spec: CharTokenizer(spec["characters"], spec["has_end_of_text"]),
    "sentencepiece": lambda folder, spec: SentencePieceTokenizer((folder / "sentencepiece.model").read_bytes()),
    "bpe": lambda folder, spec: BPETokenizer((folder / "tokenizer.json").read_text(encoding="utf-8")),
}


def load(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote. Raises `DataError` where there is none that this version can read."""
    try:
        spec = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if spec["format"] != FORMAT_VERSION:
            raise ValueError(f"format {spec['format']}, this gptjax reads {FORMAT_VERSION}")
        return KINDS[spec["kind"]](folder, spec)
    except (OSError, ValueError, KeyError) as e:
        raise DataError(f"{folder}: holds no tokenizer that can be read ({e})") from None


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise DataError(f"{text[e.start]!r} at character {e.start} is half of a surrogate pair, not text") from None


def _training_lines(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Lines of at most 2,000 characters without what SentencePiece keeps for itself."""
    for document in documents:
        document = document[:limit]
        limit -= len(document)
        if not document:
            return
        for line in document.replace(SPACE, "\n").replace("\0", "\n").split("\n"):
            yield from (line[i : i + 2000] for i in range(0, len(line), 2000))


def _byte_characters() -> dict[int, str]:
    """GPT-2's way to write a byte as a visible character."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(others)}


def _gpt2_json(vocab: Path, merges: Path) -> str:
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers

    ids = json.loads(vocab.read_text(encoding="utf-8"))
    lines = merges.read_text(encoding="utf-8").split("\n")
    pairs = [(a, b) for a, _, b in (line.partition(" ") for line in lines if line and not line.startswith("#version"))]
    if strange := [f"{a} {b}" for a, b in pairs if not {a, b, a + b} <= ids.keys()]:
        raise DataError(f"{merges}: {strange[0]!r} is not in {vocab.name}; the two files are not of one tokenizer")
    engine = Engine(models.BPE(vocab=ids, merges=pairs))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return engine.to_str()


def _mentions(part: Any, kind: str) -> bool:
    if isinstance(part, dict):
        return part.get("type") == kind or any(_mentions(v, kind) for v in part.values())
    return isinstance(part, list) and any(_mentions(v, kind) for v in part)
