"""The tokenizer of a Hugging Face folder. Every format becomes a tokenizer.json, so that one engine runs them all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax.atomic_io import LARGEST_TEXT
from gptjax.data.tokenizer.base import SPACE, Tokenizer
from gptjax.data.tokenizer.builtin import CharTokenizer
from gptjax.data.tokenizer.engine import (
    BPETokenizer,
    EngineTokenizer,
    PieceTokenizer,
    WordPieceTokenizer,
    gpt2_json,
    make_engine,
)
from gptjax.data.tokenizer.roles import ROLE_TOKENS, token_roles, token_text
from gptjax.data.tokenizer.sentencepiece_json import sentencepiece_spec
from gptjax.data.tokenizer.tokenizer_json import (
    END,
    ONE_CHARACTER,
    PROBES,
    ROLES,
    frame_of,
    same_unigram_score,
    with_frame,
)
from gptjax.errors import DataError

# classes of transformers that set the option of their byte-level pre-tokenizer, whatever tokenizer.json says
PREFIX_SPACE_CLASSES = ("GPT2Tokenizer", "GPTNeoXTokenizer", "CodeGenTokenizer")


def from_huggingface(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder, with its begin and end tokens.

    Reads the first of these that exists: tokenizer.json; vocab.json and merges.txt; tokenizer.model (SentencePiece);
    vocab.txt (WordPiece). Links are followed, because the hub's cache consists of them. Raises `DataError` if there is
    none, if one is damaged, or if ids have no known bytes.
    """
    makers: dict[tuple[str, ...], Callable[[Path, dict[str, Any]], str]] = {
        ("tokenizer.json",): lambda folder, config: _read_text(folder / "tokenizer.json"),
        ("vocab.json", "merges.txt"): _read_gpt2,
        ("tokenizer.model",): _read_sentencepiece,
        ("vocab.txt",): _read_wordpiece,
    }
    config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    for names, make in makers.items():
        if all((folder / name).is_file() for name in names):
            where = folder / names[0]
            try:
                text = _with_prefix_space(_with_added_tokens(make(folder, config), folder, config), config)
                tokenizer = _from_json(text, config)
                tokenizer.roles = token_roles(config, tokenizer.special_tokens)
                return tokenizer
            except DataError as e:
                raise e if str(folder) in str(e) else DataError(f"{where}: {e}") from None
            except Exception as e:  # the engine has no error class; damaged files cause any error
                raise DataError(f"{where}: is damaged, or a kind that gptjax does not read ({e!r})") from None
    raise DataError(
        f"{folder}: has no tokenizer; looked for {', then '.join(' with '.join(names) for names in makers)}; "
        "copy the tokenizer's files into the folder of the weights"
    )


def _with_prefix_space(tokenizer_json: str, config: dict[str, Any]) -> str:
    """A tokenizer.json whose `add_prefix_space` is that of tokenizer_config.json, as these classes of transformers do.

    Raises `DataError` where a class does more with it.
    """
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    wanted = config.get("add_prefix_space", False)
    if kind == "Qwen2Tokenizer" and wanted:
        raise DataError(f"tokenizer_config.json: add_prefix_space = {wanted!r} of a {kind} is not supported")
    if kind not in PREFIX_SPACE_CLASSES:
        return tokenizer_json
    if not isinstance(wanted, bool):
        raise DataError(f"tokenizer_config.json: add_prefix_space = {wanted!r}: must be true or false")
    spec = json.loads(tokenizer_json)
    first = spec.get("pre_tokenizer")
    for part in [first, *((first or {}).get("pretokenizers") or [])]:
        if isinstance(part, dict) and part.get("type") == "ByteLevel":
            part["add_prefix_space"] = wanted
    return json.dumps(spec, ensure_ascii=False)


def _from_json(tokenizer_json: str, config: dict[str, Any]) -> Tokenizer:
    """The decoder decides the kind."""
    spec = json.loads(tokenizer_json)
    made = make_engine(tokenizer_json)
    model = type(made.model).__name__  # not named in files of 2020, as in GPT-2's
    decoder = json.dumps(spec.get("decoder"), ensure_ascii=False)
    if model == "WordLevel" and spec.get("pre_tokenizer") == ONE_CHARACTER:
        return _char_tokenizer(spec)
    kind: type[EngineTokenizer] | None = None
    if '"ByteLevel"' in decoder:
        kind = BPETokenizer
    elif model == "WordPiece":
        kind = WordPieceTokenizer
    elif model in ("BPE", "Unigram") and any(w in decoder for w in ('"ByteFallback"', '"Metaspace"', SPACE)):
        kind = PieceTokenizer
    if kind is None:
        raise DataError(
            f"is a {model} tokenizer whose decoder is {decoder[:100]}, so its ids have no known bytes; gptjax reads "
            "byte-level BPE, SentencePiece and WordPiece"
        )
    begin, _ = frame_of(made)
    if len(begin) > 1:
        raise DataError(f"begins every text with {len(begin)} tokens ({begin}); gptjax supports at most one")
    end = token_text(config.get("eos_token"))
    return kind(tokenizer_json, begin[0] if begin else None, None if end is None else made.token_to_id(end))


def _char_tokenizer(spec: dict[str, Any]) -> CharTokenizer:
    ends = [t["id"] for t in spec["added_tokens"]]
    names = {i: piece for piece, i in spec["model"]["vocab"].items() if i not in ends}
    characters = "".join(names.get(i, "") for i in range(len(names)))
    if len(characters) != len(names) or ends not in ([], [len(names)]):
        raise DataError("is a WordLevel tokenizer of single characters that gptjax did not write")
    return CharTokenizer(characters, has_eos=bool(ends))


def _with_added_tokens(tokenizer_json: str, folder: Path, config: dict[str, Any]) -> str:
    """Adds the tokens that only the other files list, and marks as special those that the configuration names."""
    from tokenizers import AddedToken

    made = make_engine(tokenizer_json)
    known = {token.content: token for token in made.get_added_tokens_decoder().values()}
    listed: dict[int, Any] = {i: {"content": word} for word, i in _read_json(folder / "added_tokens.json").items()}
    listed |= {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    changed = False
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for i, about in sorted(listed.items()):
        if (word := about["content"]) in known:
            continue
        made.add_tokens([AddedToken(word, **{flag: about[flag] for flag in flags if flag in about})])
        if made.token_to_id(word) != i:
            raise DataError(
                f"{folder}: the added token {word!r} should have the id {i}, and has {made.token_to_id(word)}"
            )
        changed = True
    roles = [token_text(config.get(name)) for name in ROLE_TOKENS]
    for word in dict.fromkeys(filter(None, roles)):
        token = known.get(word)
        if made.token_to_id(word) is not None and (token is None or not token.special):
            made.add_special_tokens([token or AddedToken(word, normalized=False, special=True)])
            changed = True
    return made.to_str() if changed else tokenizer_json


def _read_gpt2(folder: Path, config: dict[str, Any]) -> str:
    for name in ("vocab.json", "merges.txt"):
        _check_size(folder / name)
    made = gpt2_json(folder / "vocab.json", folder / "merges.txt")
    config.setdefault("eos_token", END)
    begin = make_engine(made).token_to_id(token_text(config.setdefault("bos_token", END)) or END)
    if not config.get("add_bos_token") or begin is None:
        return made
    return json.dumps(with_frame(json.loads(made), [begin], []), ensure_ascii=False)


def _read_wordpiece(folder: Path, config: dict[str, Any]) -> str:
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    words = {role: token_text(config.setdefault(role, choices[-1])) or choices[-1] for role, choices in ROLES.items()}
    lines = _read_text(folder / "vocab.txt").split("\n")
    vocab = {line.rstrip("\r"): i for i, line in enumerate(lines) if line or i < len(lines) - 1}
    unknown, first, last = (words[role] for role in ("unk_token", "cls_token", "sep_token"))
    if missing := [word for word in (unknown, first, last) if word not in vocab]:
        raise DataError(f"has no line {missing[0]!r}, which every BERT vocabulary has; it is another kind of file")
    made = Engine(models.WordPiece(vocab=vocab, unk_token=unknown, max_input_chars_per_word=100))
    made.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens([word for word in words.values() if word in vocab])
    return json.dumps(with_frame(json.loads(made.to_str()), [vocab[first]], [vocab[last]]), ensure_ascii=False)


def _read_sentencepiece(folder: Path, config: dict[str, Any]) -> str:
    """A SentencePiece model as a tokenizer.json like Llama 2's; its ids are compared with the original's."""
    import sentencepiece

    content = _read_bytes(folder / "tokenizer.model")
    try:
        original = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as e:
        raise DataError(f"is damaged, or not a SentencePiece model ({str(e).strip().splitlines()[-1]})") from None
    spec = sentencepiece_spec(content)
    begin = original.bos_id()
    if begin >= 0 and config.get("add_bos_token") is not False:
        spec = with_frame(spec, [begin], [])
    if original.eos_id() >= 0:
        config.setdefault("eos_token", original.id_to_piece(original.eos_id()))
    if begin >= 0:
        config.setdefault("bos_token", original.id_to_piece(begin))
    made = make_engine(json.dumps(spec))
    for probe in PROBES:
        ids, expected = made.encode(probe, add_special_tokens=False).ids, original.encode(probe)
        if ids != expected and not same_unigram_score(spec, ids, expected):
            raise DataError(
                f"cannot be converted exactly: {probe!r} gives {ids}, and the original gives {expected}; use a "
                "tokenizer.json, which save_pretrained of transformers' AutoTokenizer writes"
            )
    return json.dumps(spec, ensure_ascii=False)


def _check_size(path: Path) -> None:
    """Raises `DataError` for an oversized file: the folder may be untrusted."""
    if (size := path.stat().st_size) > LARGEST_TEXT:
        raise DataError(f"{path}: has {size:,} bytes; at most {LARGEST_TEXT:,} are read")


def _read_bytes(path: Path) -> bytes:
    _check_size(path)
    return path.read_bytes()


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode()
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: is damaged ({e})") from None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} if there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: is damaged ({e})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: is damaged (a JSON object was expected)")
    return value
