"""A tokenizer written for Hugging Face. What is written is read back and compared id by id."""

import json
from pathlib import Path
from typing import Any

from gptjax.atomic_io import write_atomic
from gptjax.data.tokenizer.base import Tokenizer
from gptjax.data.tokenizer.builtin import ByteTokenizer, CharTokenizer, SentencePieceTokenizer
from gptjax.data.tokenizer.engine import EngineTokenizer, byte_characters, make_engine
from gptjax.data.tokenizer.sentencepiece_json import sentencepiece_spec
from gptjax.data.tokenizer.tokenizer_json import (
    END,
    ONE_CHARACTER,
    PROBES,
    ROLES,
    added_token,
    canonical,
    frame_of,
    same_unigram_score,
    with_frame,
)
from gptjax.errors import DataError


def to_huggingface(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into an existing folder, for `AutoTokenizer`.

    Transformers then gives the ids of `encode_prompt` and decodes them to the same text. One difference stays: special
    tokens written in a text are text to gptjax, and special tokens to transformers. Raises `DataError` if what was
    written gives other ids.
    """
    spec = spec_of(tokenizer)
    content = json.dumps(spec, ensure_ascii=False)
    if isinstance(tokenizer, EngineTokenizer) and spec == json.loads(tokenizer.tokenizer_json):
        content = tokenizer.tokenizer_json  # unchanged, byte for byte
    made = make_engine(content)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, choices in ROLES.items():
        if found := [word for word in choices if word in tokenizer.special_tokens]:
            config[role] = found[0]
    config |= tokenizer.roles
    for role, i in [("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)]:
        if i is not None:
            config[role] = made.id_to_token(i)
    if frame_of(made)[1] == []:  # transformers rebuilds the post-processor from it, with these two tokens only
        config["add_bos_token"] = tokenizer.bos_id is not None
    write_atomic(folder / "tokenizer.json", content)
    write_atomic(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    _verify(tokenizer, spec, folder / "tokenizer.json")


def spec_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer of any kind."""
    absent = ("truncation", "padding", "normalizer", "post_processor")
    nothing: dict[str, Any] = {"version": "1.0", "added_tokens": []} | dict.fromkeys(absent)
    if isinstance(tokenizer, EngineTokenizer):
        spec = json.loads(tokenizer.tokenizer_json)
        spec |= {name: None for name in ("truncation", "padding") if spec.get(name)}  # gptjax does not truncate
        begin, end = frame_of(make_engine(tokenizer.tokenizer_json))
        expected = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return spec if begin == expected else with_frame(spec, expected, end)
    if isinstance(tokenizer, ByteTokenizer):
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        vocab = {character: i for i, character in sorted(byte_characters().items())}
        model = {"type": "BPE", "vocab": vocab | {END: 256}, "merges": []}
        added = [added_token(256, END)]
        return canonical(nothing | {"added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model})
    if isinstance(tokenizer, CharTokenizer):
        vocab = {character: i for i, character in enumerate(tokenizer.characters)}
        added = []
        if tokenizer.eos_id is not None:
            vocab[END] = tokenizer.eos_id
            added = [added_token(tokenizer.eos_id, END)]
        # The unknown token is not in the vocabulary, so that any other character is refused, as in gptjax.
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        parts = {"added_tokens": added, "pre_tokenizer": ONE_CHARACTER, "decoder": {"type": "Fuse"}, "model": model}
        return canonical(nothing | parts)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return sentencepiece_spec(tokenizer.model, literal_space=True)
    raise DataError(f"the {tokenizer.kind} tokenizer has no tokenizer.json; it cannot be exported")


def _verify(tokenizer: Tokenizer, spec: dict[str, Any], path: Path) -> None:
    """Raises `DataError` unless the written file encodes and decodes as the tokenizer does."""
    made = make_engine(path.read_text(encoding="utf-8"))
    if made.get_vocab_size(with_added_tokens=True) > tokenizer.vocab_size:
        raise DataError(
            f"{path}: has {made.get_vocab_size()} tokens, and the tokenizer has {tokenizer.vocab_size}; do not use it"
        )
    _, end = frame_of(made)
    characters = isinstance(tokenizer, CharTokenizer) and tokenizer.characters
    for probe in (characters,) if isinstance(characters, str) else PROBES:
        ids, expected = made.encode(probe).ids, [*tokenizer.encode_prompt(probe).tolist(), *end]
        if ids != expected and not same_unigram_score(spec, ids, expected):
            at = next((i for i, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1]), "the end")
            raise DataError(
                f"{path}: {probe!r} gives {ids}, not gptjax's {expected} (they differ at {at}); do not use it"
            )
        if isinstance(tokenizer, EngineTokenizer):
            continue  # its decoder was not changed
        text, own = made.decode(expected, skip_special_tokens=True), tokenizer.decode(expected, from_start=True)
        if text != own:
            raise DataError(f"{path}: {expected} decodes to {text!r}, not to gptjax's {own!r}; do not use it")
