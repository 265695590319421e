"""A SentencePiece model as the tokenizer.json that gives the same ids."""

import base64
import io
import struct
from collections.abc import Iterator
from typing import Any

from gptjax.data.tokenizer.base import BYTE_PIECE, SPACE
from gptjax.data.tokenizer.tokenizer_json import added_token, canonical
from gptjax.errors import DataError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of pieces in a SentencePiece model


def sentencepiece_spec(content: bytes, literal_space: bool = False) -> dict[str, Any]:
    """The tokenizer.json that gives the same ids as a SentencePiece model.

    `literal_space`: pieces contain spaces, not "▁", so that a "▁" in a text is an ordinary character. Raises
    `DataError` for what a tokenizer.json cannot express.
    """
    model = Proto(content)
    trainer, normaliser = Proto(model.last(2, b"")), Proto(model.last(3, b""))
    pieces = [Proto(piece) for piece in model.all(1)]
    names = [piece.last(1, b"").decode() for piece in pieces]
    scores = [struct.unpack("<f", piece.last(2, bytes(4)))[0] for piece in pieces]
    types = [piece.last(3, NORMAL) for piece in pieces]
    if (algorithm := trainer.last(3, 1)) not in (1, 2):
        raise DataError("is a SentencePiece model of words or characters; gptjax reads unigram and BPE")
    if trainer.last(24, 0):
        raise DataError("puts white space after words (treat_whitespace_as_suffix), which gptjax does not support")
    prefixed, collapsed = normaliser.last(3, 1), normaliser.last(4, 1)
    space = " " if literal_space else SPACE
    names = [name.replace(SPACE, space) if kind == NORMAL else name for name, kind in zip(names, types, strict=True)]
    # White space as in SentencePiece's normaliser.
    steps: list[dict[str, Any]] = []
    if charsmap := normaliser.last(2, b""):
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if collapsed:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if prefixed:
        steps.append({"type": "Prepend", "prepend": space})
    if not literal_space:
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    unknown, fallback = types.index(UNKNOWN), bool(trainer.last(35, 0))
    words, cuts = {UNKNOWN, CONTROL}, None
    if algorithm == 1:
        scores, patterns = _unigram_scores(names, scores, types)
        if patterns:
            regex = {"Regex": "|".join(sorted(patterns))}
            cuts = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
        vocab = [list(pair) for pair in zip(names, scores, strict=True)]
        engine_model = {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": fallback}
    else:
        words.add(USER_DEFINED)
        if prefixed and USER_DEFINED in types:  # they split a text first, and each part would get a space
            raise DataError(
                "has user-defined symbols and adds a space before texts; a tokenizer.json cannot express both"
            )
        engine_model = {
            "type": "BPE",
            "unk_token": names[unknown],
            "fuse_unk": True,
            "byte_fallback": fallback,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": _merges({n: s for n, s, t in zip(names, scores, types, strict=True) if t == NORMAL}),
        }
    added = [added_token(i, names[i], t != USER_DEFINED) for i, t in enumerate(types) if t in words]
    decoder: list[dict[str, Any]] = []
    if not literal_space:
        decoder.append({"type": "Replace", "pattern": {"String": SPACE}, "content": " "})
    decoder += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefixed:
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return canonical(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
            "pre_tokenizer": cuts,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": decoder},
            "model": engine_model,
        }
    )


def _unigram_scores(names: list[str], scores: list[float], types: list[int]) -> tuple[list[float], set[str]]:
    """Scores with which the Unigram engine gives SentencePiece's ids, and regular expressions of where to split texts.

    A user-defined symbol must win against every segmentation of it. A control or byte piece matches no text in
    SentencePiece, but its name in the engine. So it gets a lower score than its characters together, if all of them are
    pieces. If not, texts are split within the name, at a character that no piece can cover there.
    """
    triples = list(zip(names, scores, types, strict=True))
    best = max((s for _, s, t in triples if t == NORMAL), default=0.0)
    single = {n: s for n, s, t in triples if t == NORMAL and len(n) == 1}
    containing: dict[str, list[str]] = {}  # characters that are no pieces -> the pieces that contain them
    for name, _, kind in triples:
        for character in set(name) - single.keys() if kind in (NORMAL, USER_DEFINED) else ():
            containing.setdefault(character, []).append(name)
    changed, patterns = list(scores), set()
    for i, (name, _, kind) in enumerate(triples):
        if kind == USER_DEFINED:
            changed[i] = len(name.encode()) * best - 0.1
        elif kind != NORMAL:
            changed[i] = sum(single.get(c, 0.0) for c in name) - 1.0
            free = (k for k, c in enumerate(name) if c not in single)
            at = next((k for k in free if not any(_fits(q, name, k) for q in containing.get(name[k], []))), None)
            if at == 0 and BYTE_PIECE.fullmatch(name):  # one expression for all byte pieces
                patterns.add("<(?=0x[0-9A-F]{2}>)")
            elif at is not None:
                before, cut, after = ("".join(map(_escaped, part)) for part in (name[:at], name[at], name[at + 1 :]))
                patterns.add(f"(?<={before}){cut}(?={after})")
    return changed, patterns


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
