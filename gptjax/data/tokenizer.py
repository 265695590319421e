"""Text to ids and back, exactly: every id stands for known bytes, so decoding is joining bytes for every kind alike.

Kinds: bytes, characters, SentencePiece trained on the corpus, byte-level BPE as GPT-2 and its successors use it, and,
for the weights of others, pieces in the manner of SentencePiece (Llama 2, Gemma) and WordPiece (BERT).
Text that looks like a special token is ordinary text; only the store ever adds `eos_id`, and only `prompt` adds
`bos_id`. Folders of Hugging Face are read and written in `tokenizer_formats`.
"""

import codecs
import functools
import io
import json
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gptjax.atomic_io import LARGEST_TEXT, read_json
from gptjax.data.words import Words, pattern_of
from gptjax.errors import DataError

Ids = np.ndarray  # int32 [number of tokens]
FORMAT_VERSION = 1
DESCRIPTION = "gptjax_tokenizer.json"
SPACE = "▁"  # how SentencePiece writes a space
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # how it writes a byte that no piece covers
LARGEST_ID = 1 << 24  # a file may be a stranger's: no vocabulary comes near it


class Tokenizer:
    """What all kinds share. `pieces[i]` are the bytes of id i; `eos_id` closes a document, where there is one."""

    kind: ClassVar[str]
    caveat: str = ""  # what it cannot represent, said when a corpus is tokenised
    bos_id: int | None = None  # what the model was trained to find before every text; None: nothing
    first_space: bool = False  # it writes a space of its own before a text; decoding a whole text drops it
    special_tokens: dict[str, int] = {}  # noqa: RUF012 (replaced, never changed); word -> id

    def __init__(self, pieces: list[bytes], eos_id: int | None):
        self.pieces = pieces
        self.eos_id = eos_id

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> Ids:
        """Raises `DataError` for text that cannot be represented, naming the character."""
        raise NotImplementedError

    def encode_special(self, text: str) -> Ids:
        """The same, but the words of special tokens become their ids: for chat templates, never for a user's text."""
        return self.encode(text)

    def prompt(self, text: str) -> Ids:
        """The ids of a text as the model was trained to see it begin: after `bos_id`, where there is one."""
        ids = self.encode(text)
        return ids if self.bos_id is None else np.concatenate([np.array([self.bos_id], np.int32), ids])

    def parts(self, texts: Sequence[str]) -> list[Ids]:
        """Texts that follow one another, the first as `prompt` has it: no token spans two of them."""
        if not self.first_space:
            return [self.prompt(texts[0]), *map(self.encode, texts[1:])]
        whole = [self.prompt("".join(texts[: i + 1])) for i in range(len(texts))]
        return [ids[len(before) :] for before, ids in zip([whole[0][:0], *whole], whole, strict=False)]

    def files(self) -> dict[str, bytes]:
        """What must be kept beside the description to load it again: file name -> content."""
        return {}

    def description(self) -> dict[str, Any]:
        """What must be kept in the description itself."""
        return {}

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.pieces[i] for i in ids)

    def decode(self, ids: Iterable[int], whole: bool = False) -> str:
        """The text of any ids; bytes that are not UTF-8 (a sample may end inside a character) become U+FFFD.

        `whole`: these are all the ids of a text, not what continues one, so the `first_space` is dropped.
        """
        text = self.decode_bytes(ids).decode(errors="replace")
        return text.removeprefix(" ") if whole and self.first_space else text

    def stream(self, ids: Iterable[int], whole: bool = False) -> Iterator[str]:
        """The same text in parts, one an id, each part whole characters only."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        drop = whole and self.first_space
        for i in ids:
            part = decoder.decode(self.pieces[i])
            yield part.removeprefix(" ") if drop else part
            drop = drop and not part
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
        super().__init__([bytes([i]) for i in range(256)] + [b""], eos_id=256)

    def encode(self, text: str) -> Ids:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)


class CharTokenizer(Tokenizer):
    """One id for each character that occurs in the corpus; refuses any other."""

    kind = "char"

    def __init__(self, characters: str, has_end_of_text: bool):
        self.characters = characters
        pieces = [c.encode() for c in characters] + [b""] * has_end_of_text
        super().__init__(pieces, eos_id=len(characters) if has_end_of_text else None)
        self.caveat = f"knows the {len(characters)} characters of its corpus and refuses any other"
        codes = np.array([ord(c) for c in characters])
        self._ids = np.full(max(codes, default=0) + 2, -1, np.int32)  # the last entry stands for all beyond
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
        super().__init__(pieces, eos_id=names.index("<|endoftext|>"))
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


class EngineTokenizer(Tokenizer):
    """What a `tokenizer.json` describes, run by the library that made it; the subclasses say what its pieces mean.

    `eos_id` None: the first of `ends` that it has. Raises `DataError` for what no subclass can give bytes to.
    """

    ends: ClassVar[tuple[str, ...]] = ("<|endoftext|>", "<|end_of_text|>", "</s>")
    probes: ClassVar[tuple[str, ...]] = ("a  b\n c", " a")  # texts that should come back as they were

    def __init__(self, tokenizer_json: str, bos_id: int | None = None, eos_id: int | None = None):
        self.tokenizer_json = tokenizer_json
        self._chosen = {"begin_of_text": bos_id, "end_of_text": eos_id}
        spec = json.loads(tokenizer_json)
        self._engine = engine(tokenizer_json)
        self._words = self._by_words(spec)
        vocab = self._engine.get_vocab(with_added_tokens=True)
        if (largest := max(vocab.values(), default=0)) > LARGEST_ID:
            raise DataError(f"tokenizer.json: has an id of {largest:,}, above any vocabulary; the file is damaged")
        added = spec.get("added_tokens") or []
        self.special_tokens = {t["content"]: t["id"] for t in added if t["special"]}
        self.bos_id = bos_id
        if eos_id is None:
            eos_id = next((vocab[name] for name in self.ends if name in vocab), None)
        for name, i in [("begin_of_text", bos_id), ("end_of_text", eos_id)]:
            if i is not None and not (isinstance(i, int) and 0 <= i <= largest):
                raise DataError(f"tokenizer: {name} = {i!r} is none of its ids, which end at {largest}")
        silent = {*self.special_tokens.values(), bos_id, eos_id}
        literal = {t["id"] for t in added}
        pieces = [b""] * (largest + 1)
        read = self._reader(spec)
        for piece, i in vocab.items():
            if i not in silent:
                pieces[i] = read(piece, i in literal)
        super().__init__(pieces, eos_id)
        self.first_space = self.decode_bytes(self.encode("a")).startswith(b" ")
        self.caveat = self._caveat(spec, vocab)

    def _reader(self, spec: dict[str, Any]) -> Callable[[str, bool], bytes]:
        """The bytes of a piece, by its name and whether it is an added token, whose name is its text."""
        raise NotImplementedError

    def _by_words(self, spec: dict[str, Any]) -> Words | None:
        """A quicker way to the same ids, where there is one."""
        return None

    def _caveat(self, spec: dict[str, Any], vocab: dict[str, int]) -> str:
        returned = {probe: self.decode(self.encode(probe), whole=True) for probe in self.probes}
        changed = ", ".join(f"{probe!r} becomes {back!r}" for probe, back in returned.items() if back != probe)
        return f"does not give texts back as they were: {changed}" if changed else ""

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.tokenizer_json.encode()}

    def description(self) -> dict[str, Any]:
        return {name: i for name, i in self._chosen.items() if i is not None}

    def encode(self, text: str) -> Ids:
        _utf8(text)
        if self._words and (ids := self._words.encode(text)) is not None:
            return ids
        return np.array(self._engine.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)

    def encode_special(self, text: str) -> Ids:
        _utf8(text)
        return np.array(self._special_engine.encode(text, add_special_tokens=False).ids, np.int32)

    @functools.cached_property
    def _special_engine(self) -> Any:
        """An engine of its own: a setting of the other would hold for what another thread encodes meanwhile."""
        made = engine(self.tokenizer_json)
        made.encode_special_tokens = False
        return made


class BPETokenizer(EngineTokenizer):
    """Byte-level BPE from a `tokenizer.json`, or from GPT-2's vocab.json and merges.txt made into one."""

    kind = "bpe"

    def _reader(self, spec: dict[str, Any]) -> Callable[[str, bool], bytes]:
        if not _mentions(spec.get("decoder"), "ByteLevel"):
            raise DataError("tokenizer.json: its decoder is not ByteLevel, so its ids do not stand for known bytes")
        byte_of = {c: b for b, c in byte_characters().items()}

        def read(piece: str, literal: bool) -> bytes:
            bytelike = not literal and all(c in byte_of for c in piece)
            return bytes(byte_of[c] for c in piece) if bytelike else piece.encode()

        return read

    def _by_words(self, spec: dict[str, Any]) -> Words | None:
        if (pattern := pattern_of(spec)) is None:
            return None
        try:
            return Words(pattern, self._engine)
        except ValueError:
            return None

    def _caveat(self, spec: dict[str, Any], vocab: dict[str, int]) -> str:
        if missing := sorted(b for b, c in byte_characters().items() if c not in vocab):
            return f"has no piece for {len(missing)} of the 256 bytes and drops them: {bytes(missing)!r}"
        if spec.get("normalizer"):
            return f"normalises text ({spec['normalizer']['type']}) before it encodes it"
        return super()._caveat(spec, vocab)

    @classmethod
    def from_path(cls, path: Path) -> "BPETokenizer":
        """Raises `DataError` where the files are missing or hold no byte-level BPE."""
        files = bpe_files(path)
        try:
            return cls(files[0].read_text(encoding="utf-8") if len(files) == 1 else gpt2_json(*files))
        except DataError:
            raise
        except Exception as e:  # the engine raises whatever it likes
            raise DataError(f"data.tokenizer = {str(path)!r}: holds no byte-level BPE ({e})") from None


class PieceTokenizer(EngineTokenizer):
    """SentencePiece in a tokenizer.json: BPE or Unigram over characters, where "▁the" is " the" and <0x0A> a byte."""

    kind = "pieces"
    ends = (*EngineTokenizer.ends, "<eos>")
    probes = (*EngineTokenizer.probes, "▁", "A ﬁ e\u0301", "\U000f0000")

    def _reader(self, spec: dict[str, Any]) -> Callable[[str, bool], bytes]:
        model, decoder = spec["model"], spec.get("decoder")
        unknown = model.get("unk_token")
        if model.get("unk_id") is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        space = SPACE if _mentions(decoder, "Metaspace") or SPACE in json.dumps(decoder, ensure_ascii=False) else " "

        def read(piece: str, literal: bool) -> bytes:
            if piece == unknown:
                return b""
            if not literal and (byte := BYTE_PIECE.fullmatch(piece)) and model.get("byte_fallback"):
                return bytes.fromhex(byte[1])
            return piece.replace(space, " ").encode()

        return read

    def _caveat(self, spec: dict[str, Any], vocab: dict[str, int]) -> str:
        prefix = "begins every text that it encodes with a space of its own" if self.first_space else ""
        return "; ".join(filter(None, [prefix, super()._caveat(spec, vocab)]))


class WordPieceTokenizer(EngineTokenizer):
    """BERT's words and "##endings". Its ids keep no white space and, mostly, no letter case: texts do not come back."""

    kind = "wordpiece"
    ends = ("[SEP]",)

    def _reader(self, spec: dict[str, Any]) -> Callable[[str, bool], bytes]:
        model = spec["model"]
        prefix = model["continuing_subword_prefix"]

        def read(piece: str, literal: bool) -> bytes:
            if piece == model["unk_token"]:
                return b""
            continues = not literal and piece.startswith(prefix) and piece != prefix
            return (piece.removeprefix(prefix) if continues else f" {piece}").encode()

        return read

    def _caveat(self, spec: dict[str, Any], vocab: dict[str, int]) -> str:
        normaliser = spec.get("normalizer") or {}
        lowers = ", and letters become lower case" if normaliser.get("lowercase") else ""
        return f"keeps words only: white space becomes one space before each word, unknown words vanish{lowers}"


def bpe_files(path: Path) -> list[Path]:
    """A tokenizer.json; or vocab.json and merges.txt; at a path that is the file or the folder of it."""
    for choice in [[path], [path / "tokenizer.json"], [path / "vocab.json", path / "merges.txt"]]:
        if all(file.is_file() for file in choice):
            return choice
    raise DataError(
        f"data.tokenizer = {str(path)!r}: neither a tokenizer.json nor a folder with vocab.json and merges.txt; "
        "byte, char and sentencepiece need no file"
    )


def _engine_kind(kind: type[EngineTokenizer]) -> Callable[[Path, dict[str, Any]], Tokenizer]:
    def make(folder: Path, spec: dict[str, Any]) -> Tokenizer:
        text = _plain_bytes(folder / "tokenizer.json").decode()
        return kind(text, spec.get("begin_of_text"), spec.get("end_of_text"))  # older descriptions have neither

    return make


KINDS: dict[str, Callable[[Path, dict[str, Any]], Tokenizer]] = {
    "byte": lambda folder, spec: ByteTokenizer(),
    "char": lambda folder, spec: CharTokenizer(spec["characters"], spec["has_end_of_text"]),
    "sentencepiece": lambda folder, spec: SentencePieceTokenizer(_plain_bytes(folder / "sentencepiece.model")),
    **{kind.kind: _engine_kind(kind) for kind in (BPETokenizer, PieceTokenizer, WordPieceTokenizer)},
}


def load(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote. Raises `DataError` where there is none that this version can read.

    The folder may be a stranger's: links and giants are refused.
    """
    try:
        spec = read_json(folder / DESCRIPTION)
        if spec["format"] != FORMAT_VERSION:
            raise ValueError(f"format {spec['format']}, this gptjax reads {FORMAT_VERSION}")
        return KINDS[spec["kind"]](folder, spec)
    except Exception as e:  # the engines raise whatever they like
        raise DataError(f"{folder}: holds no tokenizer that can be read ({e})") from None


def engine(tokenizer_json: str) -> Any:
    """The `tokenizers` engine of a tokenizer.json: all of every text, in which the words of special tokens are text."""
    import tokenizers

    try:
        made = tokenizers.Tokenizer.from_str(tokenizer_json)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # Rust's panics are no `Exception`
        raise DataError(f"tokenizer.json: is no tokenizer that the library tokenizers can read ({e})") from None
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = True
    return made


def _plain_bytes(path: Path) -> bytes:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_TEXT:
        raise DataError(f"{path}: is a link or a device, or has more than {LARGEST_TEXT:,} bytes; it is not read")
    return path.read_bytes()


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


def byte_characters() -> dict[int, str]:
    """GPT-2's way to write a byte as a visible character."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(others)}


def gpt2_json(vocab: Path, merges: Path) -> str:
    """GPT-2's two files as a tokenizer.json. Raises `DataError` where they are not of one tokenizer."""
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
