"""A SentencePiece model as the tokenizer.json that gives the same ids."""

import base64
import io
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from gptjax.data.tokenizer.base import BYTE_PIECE, SPACE
from gptjax.data.tokenizer.tokenizer_json import added_token, canonical
from gptjax.errors import DataError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of pieces in a SentencePiece model
UNIGRAM, BPE = 1, 2  # types of its algorithm


class Piece(NamedTuple):
    name: str
    score: float
    kind: int


def sentencepiece_spec(content: bytes, literal_space: bool = False) -> dict[str, Any]:
    """The tokenizer.json that gives the same ids as a SentencePiece model.

    `literal_space`: pieces contain spaces, not "▁", so that a "▁" in a text is an ordinary character. Raises
    `DataError` for what a tokenizer.json cannot express.
    """
    model = Proto(content)
    trainer = Proto(model.last(2, b""))
    normalizer = Proto(model.last(3, b""))
    algorithm = trainer.last(3, UNIGRAM)
    if algorithm not in (UNIGRAM, BPE):
        raise DataError("is a SentencePiece model of words or characters; gptjax reads unigram and BPE")
    if trainer.last(24, 0):
        raise DataError("puts white space after words (treat_whitespace_as_suffix), which gptjax does not support")
    pieces = _pieces(model, literal_space)
    adds_prefix_space = bool(normalizer.last(3, 1))
    byte_fallback = bool(trainer.last(35, 0))
    split = None
    special = {UNKNOWN, CONTROL}
    if algorithm == UNIGRAM:
        engine_model, split = _unigram_model(pieces, byte_fallback)
    else:
        special.add(USER_DEFINED)
        if adds_prefix_space and any(p.kind == USER_DEFINED for p in pieces):
            # user-defined symbols split a text first, and each part would get a space
            raise DataError(
                "has user-defined symbols and adds a space before texts; a tokenizer.json cannot express both"
            )
        engine_model = _bpe_model(pieces, byte_fallback)
    steps = _normalizers(normalizer, literal_space)
    return canonical(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                added_token(i, p.name, p.kind != USER_DEFINED) for i, p in enumerate(pieces) if p.kind in special
            ],
            "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
            "pre_tokenizer": split,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": _decoders(adds_prefix_space, literal_space)},
            "model": engine_model,
        }
    )


def _pieces(model: "Proto", literal_space: bool) -> list[Piece]:
    pieces = []
    for piece in map(Proto, model.all(1)):
        name = piece.last(1, b"").decode()
        score = struct.unpack("<f", piece.last(2, bytes(4)))[0]
        kind = piece.last(3, NORMAL)
        pieces.append(Piece(name.replace(SPACE, " ") if literal_space and kind == NORMAL else name, score, kind))
    return pieces


def _normalizers(normalizer: "Proto", literal_space: bool) -> list[dict[str, Any]]:
    """What SentencePiece does to a text first: character map, duplicate spaces, prefix space, "▁" for spaces."""
    steps: list[dict[str, Any]] = []
    if charsmap := normalizer.last(2, b""):
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if normalizer.last(4, 1):
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if normalizer.last(3, 1):
        steps.append({"type": "Prepend", "prepend": " " if literal_space else SPACE})
    if not literal_space:
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return steps


def _decoders(adds_prefix_space: bool, literal_space: bool) -> list[dict[str, Any]]:
    decoders: list[dict[str, Any]] = []
    if not literal_space:
        decoders.append({"type": "Replace", "pattern": {"String": SPACE}, "content": " "})
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if adds_prefix_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return decoders


def _bpe_model(pieces: list[Piece], byte_fallback: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "unk_token": pieces[_unknown_id(pieces)].name,
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "vocab": {piece.name: i for i, piece in enumerate(pieces)},
        "merges": _merges({piece.name: piece.score for piece in pieces if piece.kind == NORMAL}),
    }


def _unigram_model(pieces: list[Piece], byte_fallback: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The model and the pre-tokenizer that gives it SentencePiece's ids; None: no pre-tokenizer."""
    scores, patterns = _unigram_scores(pieces)
    vocab = [[piece.name, score] for piece, score in zip(pieces, scores, strict=True)]
    model = {"type": "Unigram", "unk_id": _unknown_id(pieces), "vocab": vocab, "byte_fallback": byte_fallback}
    if not patterns:
        return model, None
    regex = {"Regex": "|".join(sorted(patterns))}
    return model, {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}


def _unknown_id(pieces: list[Piece]) -> int:
    return [piece.kind for piece in pieces].index(UNKNOWN)


def _unigram_scores(pieces: list[Piece]) -> tuple[list[float], set[str]]:
    """Scores with which the Unigram engine gives SentencePiece's ids, and regular expressions of where to split texts.

    A user-defined symbol must win against every segmentation of it. A control or byte piece matches no text in
    SentencePiece, but its name in the engine. So it gets a lower score than its characters together, if all of them are
    pieces. If not, texts are split within the name, at a character that no piece can cover there.
    """
    best = max((p.score for p in pieces if p.kind == NORMAL), default=0.0)
    single = {p.name: p.score for p in pieces if p.kind == NORMAL and len(p.name) == 1}
    containing: dict[str, list[str]] = {}  # characters that are no pieces -> the pieces that contain them
    for name, _, kind in pieces:
        for character in set(name) - single.keys() if kind in (NORMAL, USER_DEFINED) else ():
            containing.setdefault(character, []).append(name)
    scores = [piece.score for piece in pieces]
    patterns = set()
    for i, (name, _, kind) in enumerate(pieces):
        if kind == USER_DEFINED:
            scores[i] = len(name.encode()) * best - 0.1
        elif kind != NORMAL:
            scores[i] = sum(single.get(c, 0.0) for c in name) - 1.0
            free = (k for k, c in enumerate(name) if c not in single)
            at = next((k for k in free if not any(_fits(q, name, k) for q in containing.get(name[k], []))), None)
            if at == 0 and BYTE_PIECE.fullmatch(name):  # one expression for all byte pieces
                patterns.add("<(?=0x[0-9A-F]{2}>)")
            elif at is not None:
                before, character, after = ("".join(map(_escaped, s)) for s in (name[:at], name[at], name[at + 1 :]))
                patterns.add(f"(?<={before}){character}(?={after})")
    return scores, patterns


def _fits(piece: str, name: str, at: int) -> bool:
    """Whether a piece can cover character `at` of the text `name`."""
    shifts = (at - j for j, c in enumerate(piece) if c == name[at])
    return any(all(name[s + j] == c for j, c in enumerate(piece) if 0 <= s + j < len(name)) for s in shifts)


def _escaped(character: str) -> str:
    return character if character.isalnum() else "\\" + character


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """The merges of a BPE, best first: every way to split a piece into two others."""
    ranks = {name: i for i, name in enumerate(scores)}
    pairs = [
        (score, ranks[name[:cut]], ranks[name[cut:]], [name[:cut], name[cut:]])
        for name, score in scores.items()
        for cut in range(1, len(name))
        if name[:cut] in ranks and name[cut:] in ranks
    ]
    return [pair for *_, pair in sorted(pairs, key=lambda found: (-found[0], found[1], found[2]))]


class Proto:
    """A protocol-buffers message by field number: bytes, or an int for a varint.

    Not `sentencepiece_model_pb2`, which refuses every protobuf that is older than the one it was generated with.
    """

    def __init__(self, content: bytes):
        self._fields: dict[int, list[Any]] = {}
        for number, value in _fields(io.BytesIO(content)):
            self._fields.setdefault(number, []).append(value)

    def all(self, number: int) -> list[Any]:
        return self._fields.get(number, [])

    def last(self, number: int, default: Any) -> Any:
        return self._fields.get(number, [default])[-1]


def _fields(stream: io.BytesIO) -> Iterator[tuple[int, Any]]:
    while start := stream.read(1):
        stream.seek(-len(start), io.SEEK_CUR)
        tag = _varint(stream)
        sizes = {1: 8, 5: 4}
        if (wire := tag & 7) == 0:
            yield tag >> 3, _varint(stream)
        elif wire == 2 or wire in sizes:
            size = _varint(stream) if wire == 2 else sizes[wire]
            if len(value := stream.read(size)) != size:
                raise DataError("is damaged: it ends inside a field")
            yield tag >> 3, value
        else:
            raise DataError(f"is damaged: a field of the unknown type {wire}")


def _varint(stream: io.BytesIO) -> int:
    value = shift = 0
    while shift < 70 and (byte := stream.read(1)):
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
        shift += 7
    raise DataError("is damaged: it ends inside a number")
