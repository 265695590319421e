"""Tokenizers in the folders of Hugging Face, read and written.

What is read becomes a tokenizer.json, whatever it was, so one engine runs them all and the way back is short. What is
written is read back and compared, id by id, before anyone relies on it.
"""

import base64
import io
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.atomic_io import LARGEST_TEXT, write_atomic
from gptjax.data.tokenizer import (
    BYTE_PIECE,
    SPACE,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    EngineTokenizer,
    PieceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordPieceTokenizer,
    byte_characters,
    engine,
    gpt2_json,
)
from gptjax.errors import DataError

END = "<|endoftext|>"  # how gptjax's own kinds call the end of a text
ONE_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
ROLES = {
    "unk_token": ("<unk>", "[UNK]"),
    "pad_token": ("<pad>", "[PAD]"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("<mask>", "[MASK]"),
}
PROBES = (
    "Once upon a time, there were 3.14159 foxes; they'd say: \"don't\"!",
    "  two spaces\tand\ttabs \n\n\r\n  def f(x):\n        return x  ",
    "naïve Ünïcode 中文，汉字 한국어 русский עברית e\u0301 ﬁ",
    "😀👩‍👩‍👧 \u00a0\u3000 <b>&amp;</b> <0x41> 🇫🇷",
    "a",
    "\n",
    " ",
    "",
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of a SentencePiece piece


def from_huggingface(folder: Path) -> Tokenizer:
    """The tokenizer of a model in Hugging Face's layout, with the words that begin and end its texts.

    Reads tokenizer.json; else vocab.json and merges.txt; else tokenizer.model (SentencePiece); else vocab.txt
    (WordPiece). Links are followed, as the hub's cache is made of them. Raises `DataError` where none of these is
    there, where one is damaged, and where its ids do not stand for known bytes.
    """
    makers: dict[tuple[str, ...], Callable[[Path, dict[str, Any]], str]] = {
        ("tokenizer.json",): lambda folder, config: _text(folder / "tokenizer.json"),
        ("vocab.json", "merges.txt"): _read_gpt2,
        ("tokenizer.model",): _read_sentencepiece,
        ("vocab.txt",): _read_wordpiece,
    }
    config = _object(folder / "special_tokens_map.json") | _object(folder / "tokenizer_config.json")
    for names, make in makers.items():
        if all((folder / name).is_file() for name in names):
            where = folder / names[0]
            try:
                return _from_json(_with_words(make(folder, config), folder, config), config)
            except DataError as e:
                raise e if str(folder) in str(e) else DataError(f"{where}: {e}") from None
            except Exception as e:  # the engine, and what stands in the files, raise whatever they like
                raise DataError(f"{where}: is damaged, or no tokenizer that gptjax knows ({e!r})") from None
    raise DataError(
        f"{folder}: holds no tokenizer; looked for {', then '.join(' with '.join(names) for names in makers)}; "
        "copy the tokenizer's files beside the weights"
    )


def to_huggingface(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into an existing folder, for `AutoTokenizer`.

    Transformers then gives the ids of `prompt`, and their text; only the words of special tokens, which are text to
    gptjax, are special tokens to it. Raises `DataError` where what was written would give other ids.
    """
    spec = _spec(tokenizer)
    content = json.dumps(spec, ensure_ascii=False)
    if isinstance(tokenizer, EngineTokenizer) and spec == json.loads(tokenizer.tokenizer_json):
        content = tokenizer.tokenizer_json  # as it came, to the byte
    made = engine(content)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, i in [("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)]:
        if i is not None:
            config[role] = made.id_to_token(i)
    for role, choices in ROLES.items():
        if there := [word for word in choices if word in tokenizer.special_tokens]:
            config[role] = there[0]
    if _frame(made)[1] == []:  # this setting rebuilds the frame of a text, with the two words above only
        config["add_bos_token"] = tokenizer.bos_id is not None
    write_atomic(folder / "tokenizer.json", content)
    write_atomic(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    _verify(tokenizer, spec, folder / "tokenizer.json")


def _from_json(tokenizer_json: str, config: dict[str, Any]) -> Tokenizer:
    """A tokenizer of the kind that its decoder tells."""
    spec = json.loads(tokenizer_json)
    made = engine(tokenizer_json)
    model = type(made.model).__name__  # files of 2020, GPT-2's among them, do not name it
    decoder = json.dumps(spec.get("decoder"), ensure_ascii=False)
    if model == "WordLevel" and spec.get("pre_tokenizer") == ONE_CHARACTER:
        return _characters(spec)
    kind: type[EngineTokenizer] | None = None
    if '"ByteLevel"' in decoder:
        kind = BPETokenizer
    elif model == "WordPiece":
        kind = WordPieceTokenizer
    elif model in ("BPE", "Unigram") and any(w in decoder for w in ('"ByteFallback"', '"Metaspace"', SPACE)):
        kind = PieceTokenizer
    if kind is None:
        raise DataError(
            f"is a {model} tokenizer whose decoder is {decoder[:100]}, so its ids do not stand for known "
            "bytes; gptjax reads byte-level BPE, the pieces of SentencePiece, and WordPiece"
        )
    begin, _ = _frame(made)
    if len(begin) > 1:
        raise DataError(f"begins every text with {len(begin)} tokens ({begin}); gptjax knows one at most")
    end = _word(config.get("eos_token"))
    return kind(tokenizer_json, begin[0] if begin else None, None if end is None else made.token_to_id(end))


def _characters(spec: dict[str, Any]) -> CharTokenizer:
    ends = [t["id"] for t in spec["added_tokens"]]
    names = {i: piece for piece, i in spec["model"]["vocab"].items() if i not in ends}
    characters = "".join(names.get(i, "") for i in range(len(names)))
    if len(characters) != len(names) or ends not in ([], [len(names)]):
        raise DataError("is a WordLevel tokenizer of single characters, but not as gptjax writes one")
    return CharTokenizer(characters, has_end_of_text=bool(ends))


def _frame(made: Any) -> tuple[list[int], list[int]]:
    """The ids that the engine puts before and after every text."""
    if made.post_processor is None:
        return [], []
    empty, text = (made.encode(content, add_special_tokens=True).ids for content in ("", "a"))
    begin = next((i for i, pair in enumerate(zip(empty, text, strict=False)) if pair[0] != pair[1]), len(empty))
    return empty[:begin], empty[begin:]


def _word(token: Any) -> str | None:
    """The word of a token as the configurations write it: itself, or an object with more about it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _with_words(tokenizer_json: str, folder: Path, config: dict[str, Any]) -> str:
    """Adds the tokens that stand only beside the tokenizer, and makes special those that the configuration calls so."""
    from tokenizers import AddedToken

    made = engine(tokenizer_json)
    there = {token.content: token for token in made.get_added_tokens_decoder().values()}
    wanted: dict[int, Any] = {i: {"content": word} for word, i in _object(folder / "added_tokens.json").items()}
    wanted |= {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    changed = False
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for i, about in sorted(wanted.items()):
        if (word := about["content"]) in there:
            continue
        made.add_tokens([AddedToken(word, **{flag: about[flag] for flag in flags if flag in about})])
        if made.token_to_id(word) != i:
            raise DataError(f"{folder}: the added token {word!r} should be {i}, and is {made.token_to_id(word)}")
        changed = True
    roles = [_word(config.get(f"{role}_token")) for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")]
    for word in dict.fromkeys(filter(None, roles)):
        token = there.get(word)
        if made.token_to_id(word) is not None and (token is None or not token.special):
            made.add_special_tokens([token or AddedToken(word, normalized=False, special=True)])
            changed = True
    return made.to_str() if changed else tokenizer_json


def _read_gpt2(folder: Path, config: dict[str, Any]) -> str:
    for name in ("vocab.json", "merges.txt"):
        _check_size(folder / name)
    made = gpt2_json(folder / "vocab.json", folder / "merges.txt")
    config.setdefault("eos_token", END)
    begin = engine(made).token_to_id(_word(config.setdefault("bos_token", END)) or END)
    if not config.get("add_bos_token") or begin is None:
        return made
    return json.dumps(_framed(json.loads(made), [begin], []), ensure_ascii=False)


def _read_wordpiece(folder: Path, config: dict[str, Any]) -> str:
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    words = {role: _word(config.setdefault(role, choices[-1])) or choices[-1] for role, choices in ROLES.items()}
    lines = _text(folder / "vocab.txt").split("\n")
    vocab = {line.rstrip("\r"): i for i, line in enumerate(lines) if line or i < len(lines) - 1}
    unknown, first, last = (words[role] for role in ("unk_token", "cls_token", "sep_token"))
    if missing := [word for word in (unknown, first, last) if word not in vocab]:
        raise DataError(f"has no line {missing[0]!r}, which every BERT vocabulary has; it may be another kind of file")
    made = Engine(models.WordPiece(vocab=vocab, unk_token=unknown, max_input_chars_per_word=100))
    made.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens([word for word in words.values() if word in vocab])
    return json.dumps(_framed(json.loads(made.to_str()), [vocab[first]], [vocab[last]]), ensure_ascii=False)


def _read_sentencepiece(folder: Path, config: dict[str, Any]) -> str:
    """A SentencePiece model as a tokenizer.json, in the manner of Llama 2's; compared with the original's ids."""
    import sentencepiece

    content = _bytes(folder / "tokenizer.model")
    try:
        original = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as e:
        raise DataError(f"is damaged, or no SentencePiece model ({str(e).strip().splitlines()[-1]})") from None
    spec = sentencepiece_spec(content)
    begin = original.bos_id()
    if begin >= 0 and config.get("add_bos_token") is not False:
        spec = _framed(spec, [begin], [])
    if original.eos_id() >= 0:
        config.setdefault("eos_token", original.id_to_piece(original.eos_id()))
    if begin >= 0:
        config.setdefault("bos_token", original.id_to_piece(begin))
    made = engine(json.dumps(spec))
    for probe in PROBES:
        ids, expected = made.encode(probe, add_special_tokens=False).ids, original.encode(probe)
        if ids != expected and not _as_likely(spec, ids, expected):
            raise DataError(
                f"cannot be converted exactly: {probe!r} gives {ids}, where the original gives {expected}; use a "
                "tokenizer.json, which transformers' AutoTokenizer writes by save_pretrained"
            )
    return json.dumps(spec, ensure_ascii=False)


def sentencepiece_spec(content: bytes, literal_space: bool = False) -> dict[str, Any]:
    """The tokenizer.json that gives a SentencePiece model's ids.

    `literal_space`: pieces hold spaces as spaces, so that a text's own "▁" is a character like any other. Raises
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
        raise DataError("writes white space after words (treat_whitespace_as_suffix), which gptjax does not read")
    prefixed, collapsed = normaliser.last(3, 1), normaliser.last(4, 1)
    space = " " if literal_space else SPACE
    names = [name.replace(SPACE, space) if kind == NORMAL else name for name, kind in zip(names, types, strict=True)]
    # White space, as SentencePiece's normaliser treats it.
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
        if prefixed and USER_DEFINED in types:  # they cut a text before it is normalised: each part would be prefixed
            raise DataError(
                "has symbols of its user and writes a space before texts, which no tokenizer.json expresses"
            )
        engine_model = {
            "type": "BPE",
            "unk_token": names[unknown],
            "fuse_unk": True,
            "byte_fallback": fallback,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": _merges({n: s for n, s, t in zip(names, scores, types, strict=True) if t == NORMAL}),
        }
    added = [_added(i, names[i], t != USER_DEFINED) for i, t in enumerate(types) if t in words]
    decoder: list[dict[str, Any]] = []
    if not literal_space:
        decoder.append({"type": "Replace", "pattern": {"String": SPACE}, "content": " "})
    decoder += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefixed:
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _canonical(
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
    """The scores that give the Unigram engine SentencePiece's ids; and regular expressions of where to cut texts.

    A user's symbol is preferred to all that it could be cut into. A control or byte piece is matched by no text in
    SentencePiece, and by its name in the engine: so it scores less than its own characters, if they are pieces; if
    not, a text is cut within the name, at a character that no piece can hold there.
    """
    triples = list(zip(names, scores, types, strict=True))
    best = max((s for _, s, t in triples if t == NORMAL), default=0.0)
    single = {n: s for n, s, t in triples if t == NORMAL and len(n) == 1}
    holding: dict[str, list[str]] = {}  # characters that are no pieces -> the pieces that they are in
    for name, _, kind in triples:
        for character in set(name) - single.keys() if kind in (NORMAL, USER_DEFINED) else ():
            holding.setdefault(character, []).append(name)
    changed, patterns = list(scores), set()
    for i, (name, _, kind) in enumerate(triples):
        if kind == USER_DEFINED:
            changed[i] = len(name.encode()) * best - 0.1
        elif kind != NORMAL:
            changed[i] = sum(single.get(c, 0.0) for c in name) - 1.0
            free = (k for k, c in enumerate(name) if c not in single)
            at = next((k for k in free if not any(_fits(q, name, k) for q in holding.get(name[k], []))), None)
            if at == 0 and BYTE_PIECE.fullmatch(name):  # one expression for all of them
                patterns.add("<(?=0x[0-9A-F]{2}>)")
            elif at is not None:
                before, cut, after = ("".join(map(_quoted, part)) for part in (name[:at], name[at], name[at + 1 :]))
                patterns.add(f"(?<={before}){cut}(?={after})")
    return changed, patterns


def _fits(piece: str, name: str, at: int) -> bool:
    """Whether a piece can lie over character `at` of a text that is written like `name`."""
    shifts = (at - j for j, c in enumerate(piece) if c == name[at])
    return any(all(name[s + j] == c for j, c in enumerate(piece) if 0 <= s + j < len(name)) for s in shifts)


def _quoted(character: str) -> str:
    return character if character.isalnum() else "\\" + character


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """The pairs that BPE joins, best first: every way to cut a piece into two others."""
    ranks = {name: i for i, name in enumerate(scores)}
    pairs = [
        (score, ranks[name[:cut]], ranks[name[cut:]], [name[:cut], name[cut:]])
        for name, score in scores.items()
        for cut in range(1, len(name))
        if name[:cut] in ranks and name[cut:] in ranks
    ]
    return [pair for *_, pair in sorted(pairs, key=lambda found: (-found[0], found[1], found[2]))]


def _spec(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json of any kind, as an object."""
    absent = ("truncation", "padding", "normalizer", "post_processor")
    nothing: dict[str, Any] = {"version": "1.0", "added_tokens": []} | dict.fromkeys(absent)
    if isinstance(tokenizer, EngineTokenizer):
        spec = json.loads(tokenizer.tokenizer_json)
        spec |= {name: None for name in ("truncation", "padding") if spec.get(name)}  # gptjax encodes all of a text
        begin, end = _frame(engine(tokenizer.tokenizer_json))
        expected = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return spec if begin == expected else _framed(spec, expected, end)
    if isinstance(tokenizer, ByteTokenizer):
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        vocab = {character: i for i, character in sorted(byte_characters().items())}
        model = {"type": "BPE", "vocab": vocab | {END: 256}, "merges": []}
        added = [_added(256, END)]
        return _canonical(nothing | {"added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model})
    if isinstance(tokenizer, CharTokenizer):
        vocab = {character: i for i, character in enumerate(tokenizer.characters)}
        added = []
        if tokenizer.eos_id is not None:
            vocab[END] = tokenizer.eos_id
            added = [_added(tokenizer.eos_id, END)]
        # An unknown word that is in no vocabulary: any other character is refused, as gptjax does.
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        parts = {"added_tokens": added, "pre_tokenizer": ONE_CHARACTER, "decoder": {"type": "Fuse"}, "model": model}
        return _canonical(nothing | parts)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return sentencepiece_spec(tokenizer.model, literal_space=True)
    raise DataError(f"the {tokenizer.kind} tokenizer cannot be written for Hugging Face")


def _added(i: int, content: str, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content} | flags | {"special": special}


def _framed(spec: dict[str, Any], begin: list[int], end: list[int]) -> dict[str, Any]:
    """The same tokenizer, which puts these ids before and after every text."""
    vocab = engine(json.dumps(spec)).get_vocab(with_added_tokens=True)
    names = {i: name for name, i in vocab.items() if i in begin + end}
    words = [{"SpecialToken": {"id": names[i], "type_id": 0}} for i in begin]
    closing = [{"SpecialToken": {"id": names[i], "type_id": 0}} for i in end]
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [*words, first, *closing],
        "pair": [*words, first, *closing, second, *closing],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in names.items()},
    }
    return spec | {"post_processor": template if begin or end else None}


def _canonical(spec: dict[str, Any]) -> dict[str, Any]:
    """As the engine itself writes it, with every default in its place."""
    canonical: dict[str, Any] = json.loads(engine(json.dumps(spec)).to_str())
    return canonical


def _verify(tokenizer: Tokenizer, spec: dict[str, Any], path: Path) -> None:
    """Raises `DataError` unless the written file gives the tokenizer's own ids, and their text."""
    made = engine(path.read_text(encoding="utf-8"))
    if made.get_vocab_size(with_added_tokens=True) > tokenizer.vocab_size:
        raise DataError(f"{path}: has {made.get_vocab_size()} pieces, and the tokenizer {tokenizer.vocab_size}")
    _, end = _frame(made)
    characters = isinstance(tokenizer, CharTokenizer) and tokenizer.characters
    for probe in (characters,) if isinstance(characters, str) else PROBES:
        ids, expected = made.encode(probe).ids, [*tokenizer.prompt(probe).tolist(), *end]
        if ids != expected and not _as_likely(spec, ids, expected):
            at = next((i for i, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1]), "the end")
            raise DataError(f"{path}: {probe!r} gives {ids}, not gptjax's {expected} (first at {at}); do not use it")
        if isinstance(tokenizer, EngineTokenizer):
            continue  # its decoder is what it was
        text, own = made.decode(expected, skip_special_tokens=True), tokenizer.decode(expected, whole=True)
        if text != own:
            raise DataError(f"{path}: {expected} is {text!r}, not gptjax's {own!r}; do not use it")


def _as_likely(spec: dict[str, Any], ids: list[int], others: list[int]) -> bool:
    """Whether two cuts of a text are the same to a Unigram model: SentencePiece adds its scores in single precision."""
    if spec["model"].get("type") != "Unigram":
        return False
    vocab = spec["model"]["vocab"]
    name = lambda i: vocab[i][0] if i < len(vocab) else ""  # noqa: E731
    if "".join(map(name, ids)) != "".join(map(name, others)):
        return False
    one, other = (sum(vocab[i][1] for i in cut if not BYTE_PIECE.fullmatch(name(i))) for cut in (ids, others))
    return bool(np.isclose(one, other, rtol=1e-6, atol=1e-4))


class Proto:
    """A message of protocol buffers, by the numbers of its fields: bytes, or an int for a varint."""

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


def _check_size(path: Path) -> None:
    """Raises `DataError` for a giant: the folder may be a stranger's."""
    if (size := path.stat().st_size) > LARGEST_TEXT:
        raise DataError(f"{path}: has {size:,} bytes, more than the {LARGEST_TEXT:,} that such a file may have")


def _bytes(path: Path) -> bytes:
    _check_size(path)
    return path.read_bytes()


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode()
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: is damaged ({e})") from None


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; nothing where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: is damaged ({e})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: is damaged (a JSON object was expected)")
    return value
