"""Tokenizers of a `tokenizer.json`, run by the library `tokenizers`: byte-level BPE, SentencePiece and WordPiece."""

import functools
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gptjax.data.tokenizer.base import BYTE_PIECE, SPACE, Ids, Tokenizer, utf8
from gptjax.data.tokenizer.roles import token_roles
from gptjax.data.tokenizer.word_cache import WordCache, pattern_of
from gptjax.errors import DataError, warn

LARGEST_ID = 1 << 24  # far above any vocabulary; a larger one in an untrusted file would allocate any memory


class EngineTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the library `tokenizers`. The subclasses know which bytes a piece stands for.

    `eos_id` None: the first of `eos_names` in the vocabulary. Raises `DataError` if ids have no known bytes.
    """

    eos_names: ClassVar[tuple[str, ...]] = ("<|endoftext|>", "<|end_of_text|>", "</s>")
    probes: ClassVar[tuple[str, ...]] = ("a  b\n c", " a")  # texts that should survive a round trip

    def __init__(self, tokenizer_json: str, bos_id: int | None = None, eos_id: int | None = None):
        self.tokenizer_json = tokenizer_json
        self._given = {"begin_of_text": bos_id, "end_of_text": eos_id}
        spec = json.loads(tokenizer_json)
        self._engine = make_engine(tokenizer_json)
        vocab = self._engine.get_vocab(with_added_tokens=True)
        if (largest := max(vocab.values(), default=0)) > LARGEST_ID:
            raise DataError(f"tokenizer.json: has an id of {largest:,}, above any vocabulary; the file is damaged")
        self._word_cache = self._make_word_cache(spec)  # copies the engine, which takes minutes for a huge id
        added = spec.get("added_tokens") or []
        self.special_tokens = {t["content"]: t["id"] for t in added if t["special"]}
        self.bos_id = bos_id
        if eos_id is None:
            eos_id = next((vocab[name] for name in self.eos_names if name in vocab), None)
        for name, i in [("begin_of_text", bos_id), ("end_of_text", eos_id)]:
            if i is not None and not (isinstance(i, int) and 0 <= i <= largest):
                raise DataError(f"tokenizer: {name} = {i!r} is not one of its ids, 0 to {largest}")
        silent = {*self.special_tokens.values(), bos_id, eos_id}
        literal = {t["id"] for t in added}
        id_to_bytes = [b""] * (largest + 1)
        decode_piece = self._piece_decoder(spec)
        for piece, i in vocab.items():
            if i not in silent:
                id_to_bytes[i] = decode_piece(piece, i in literal)
        super().__init__(id_to_bytes, eos_id)
        self.adds_prefix_space = self.decode_bytes(self.encode("a")).startswith(b" ")
        self.caveat = self._caveat(spec, vocab)

    def without(self, words: Collection[str]) -> "EngineTokenizer":
        """The tokenizer without some of its special tokens."""
        spec = json.loads(self.tokenizer_json)
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in words]
        tokenizer = type(self)(json.dumps(spec, ensure_ascii=False), self.bos_id, self.eos_id)
        tokenizer.roles = token_roles(self.roles, tokenizer.special_tokens)
        return tokenizer

    def _piece_decoder(self, spec: dict[str, Any]) -> Callable[[str, bool], bytes]:
        """A function from (piece, is an added token) to bytes; the name of an added token is its text."""
        raise NotImplementedError

    def _make_word_cache(self, spec: dict[str, Any]) -> WordCache | None:
        """A faster way to the same ids, for pre-tokenizers that allow it."""
        return None

    def _caveat(self, spec: dict[str, Any], vocab: dict[str, int]) -> str:
        returned = {probe: self.decode(self.encode(probe), from_start=True) for probe in self.probes}
        changed = ", ".join(f"{probe!r} becomes {back!r}" for probe, back in returned.items() if back != probe)
        return f"changes texts: {changed}" if changed else ""

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.tokenizer_json.encode()}

    def description(self) -> dict[str, Any]:
        given: dict[str, Any] = {name: i for name, i in self._given.items() if i is not None}
        return given | ({"roles": self.roles} if self.roles else {})

    def encode(self, text: str) -> Ids:
        utf8(text)
        if self._word_cache and (ids := self._word_cache.encode(text)) is not None:
            return ids
        return np.array(self._engine.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)

    def encode_special(self, text: str) -> Ids:
        utf8(text)
        return np.array(self._special_engine.encode(text, add_special_tokens=False).ids, np.int32)

    @functools.cached_property
    def _special_engine(self) -> Any:
        """A second engine: toggling the setting on the first would affect other threads."""
        made = make_engine(self.tokenizer_json)
        made.encode_special_tokens = False
        return made


class BPETokenizer(EngineTokenizer):
    """Byte-level BPE from a `tokenizer.json`, or from GPT-2's vocab.json and merges.txt."""

    kind = "bpe"

    def _piece_decoder(self, spec: dict[str, Any]) -> Callable[[str, bool], bytes]:
        if not _has_type(spec.get("decoder"), "ByteLevel"):
            raise DataError("tokenizer.json: its decoder is not ByteLevel, so its ids do not stand for known bytes")
        byte_of = {c: b for b, c in byte_characters().items()}

        def decode_piece(piece: str, literal: bool) -> bytes:
            bytelike = not literal and all(c in byte_of for c in piece)
            return bytes(byte_of[c] for c in piece) if bytelike else piece.encode()

        return decode_piece

    def _make_word_cache(self, spec: dict[str, Any]) -> WordCache | None:
        if (pattern := pattern_of(spec)) is None:
            return None
        try:
            return WordCache(pattern, self._engine)
        except ValueError:
            return None

    def _caveat(self, spec: dict[str, Any], vocab: dict[str, int]) -> str:
        if missing := sorted(b for b, c in byte_characters().items() if c not in vocab):
            return f"has no token for {len(missing)} of the 256 bytes and drops them: {bytes(missing)!r}"
        if spec.get("normalizer"):
            return f"normalises text ({spec['normalizer']['type']}) before encoding"
        return super()._caveat(spec, vocab)

    @classmethod
    def from_path(cls, path: Path) -> "BPETokenizer":
        """Raises `DataError` if the files are missing or hold no byte-level BPE."""
        files = bpe_files(path)
        try:
            return cls(files[0].read_text(encoding="utf-8") if len(files) == 1 else gpt2_json(*files))
        except DataError:
            raise
        except Exception as e:  # the engine has no error class of its own
            raise DataError(f"data.tokenizer = {str(path)!r}: holds no byte-level BPE ({e})") from None


class PieceTokenizer(EngineTokenizer):
    """SentencePiece as a tokenizer.json: BPE or Unigram over characters; "▁the" is " the", <0x0A> is a byte."""

    kind = "pieces"
    eos_names = (*EngineTokenizer.eos_names, "<eos>")
    probes = (*EngineTokenizer.probes, "▁", "A ﬁ e\u0301", "\U000f0000")

    def _piece_decoder(self, spec: dict[str, Any]) -> Callable[[str, bool], bytes]:
        model, decoder = spec["model"], spec.get("decoder")
        unknown = model.get("unk_token")
        if model.get("unk_id") is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        space = SPACE if _has_type(decoder, "Metaspace") or SPACE in json.dumps(decoder, ensure_ascii=False) else " "

        def decode_piece(piece: str, literal: bool) -> bytes:
            if piece == unknown:
                return b""
            if not literal and (byte := BYTE_PIECE.fullmatch(piece)) and model.get("byte_fallback"):
                return bytes.fromhex(byte[1])
            return piece.replace(space, " ").encode()

        return decode_piece

    def _caveat(self, spec: dict[str, Any], vocab: dict[str, int]) -> str:
        prefix = "adds a space before every text" if self.adds_prefix_space else ""
        return "; ".join(filter(None, [prefix, super()._caveat(spec, vocab)]))


class WordPieceTokenizer(EngineTokenizer):
    """BERT's words and "##endings". White space and, in most models, letter case are lost."""

    kind = "wordpiece"
    eos_names = ("[SEP]",)

    def _piece_decoder(self, spec: dict[str, Any]) -> Callable[[str, bool], bytes]:
        model = spec["model"]
        prefix = model["continuing_subword_prefix"]

        def decode_piece(piece: str, literal: bool) -> bytes:
            if piece == model["unk_token"]:
                return b""
            continues = not literal and piece.startswith(prefix) and piece != prefix
            return (piece.removeprefix(prefix) if continues else f" {piece}").encode()

        return decode_piece

    def _caveat(self, spec: dict[str, Any], vocab: dict[str, int]) -> str:
        normaliser = spec.get("normalizer") or {}
        lowers = ", letters become lower case" if normaliser.get("lowercase") else ""
        return f"keeps words only: white space becomes one space before each word, unknown words are dropped{lowers}"


def make_engine(tokenizer_json: str) -> Any:
    """The `tokenizers` engine of a tokenizer.json: no truncation, and special tokens in a text are ordinary text."""
    import tokenizers

    try:
        made = tokenizers.Tokenizer.from_str(tokenizer_json)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a Rust panic is not an `Exception`
        raise DataError(f"tokenizer.json: the library tokenizers cannot read it ({e})") from None
    if getattr(made.model, "dropout", None):
        _say_dropout_is_off(made.model.dropout)
        made.model.dropout = None
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = True
    return made


@functools.cache  # once
def _say_dropout_is_off(rate: float) -> None:
    warn(f"tokenizer.json: its BPE dropout of {rate:g} is switched off: a text has the same ids every time")


def bpe_files(path: Path) -> list[Path]:
    """The files of a BPE: a tokenizer.json, or vocab.json and merges.txt. `path` is the file or its folder."""
    for choice in [[path], [path / "tokenizer.json"], [path / "vocab.json", path / "merges.txt"]]:
        if all(file.is_file() for file in choice):
            return choice
    raise DataError(
        f"data.tokenizer = {str(path)!r}: is neither a tokenizer.json nor a folder with vocab.json and merges.txt; "
        "give one of them, or use byte, char or sentencepiece, which need no file"
    )


def gpt2_json(vocab: Path, merges: Path) -> str:
    """GPT-2's two files as a tokenizer.json. Raises `DataError` if they belong to different tokenizers."""
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers

    ids = json.loads(vocab.read_text(encoding="utf-8"))
    lines = merges.read_text(encoding="utf-8").split("\n")
    pairs = [(a, b) for a, _, b in (line.partition(" ") for line in lines if line and not line.startswith("#version"))]
    if strange := [f"{a} {b}" for a, b in pairs if not {a, b, a + b} <= ids.keys()]:
        raise DataError(f"{merges}: {strange[0]!r} is not in {vocab.name}; the files belong to different tokenizers")
    engine = Engine(models.BPE(vocab=ids, merges=pairs))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return engine.to_str()


def byte_characters() -> dict[int, str]:
    """GPT-2's mapping of bytes to visible characters."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(others)}


def _has_type(part: Any, kind: str) -> bool:
    """Whether a part of a tokenizer.json, or anything in it, has this type."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_has_type(v, kind) for v in part.values())
    return isinstance(part, list) and any(_has_type(v, kind) for v in part)
