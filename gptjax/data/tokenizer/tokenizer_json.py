"""Parts of a tokenizer.json as `tokenizers` writes them, and checks that two of them give the same ids."""

import json
from typing import Any

import numpy as np

from gptjax.data.tokenizer.base import BYTE_PIECE
from gptjax.data.tokenizer.engine import make_engine

END = "<|endoftext|>"  # the end-of-text token of gptjax's own kinds
ONE_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
ROLES = {
    "unk_token": ("<unk>", "[UNK]"),
    "pad_token": ("<pad>", "[PAD]"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("<mask>", "[MASK]"),
}
PROBES = (  # texts on which two tokenizers must agree
    "Once upon a time, there were 3.14159 foxes; they'd say: \"don't\"!",
    "  two spaces\tand\ttabs \n\n\r\n  def f(x):\n        return x  ",
    "naïve Ünïcode 中文，汉字 한국어 русский עברית e\u0301 ﬁ",
    "😀👩‍👩‍👧 \u00a0\u3000 <b>&amp;</b> <0x41> 🇫🇷",
    "a",
    "\n",
    " ",
    "",
)


def added_token(i: int, content: str, special: bool = True) -> dict[str, Any]:
    """An entry of `added_tokens`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content} | flags | {"special": special}


def with_frame(spec: dict[str, Any], begin: list[int], end: list[int]) -> dict[str, Any]:
    """The same tokenizer with a post-processor that puts these ids before and after every text."""
    vocab = make_engine(json.dumps(spec)).get_vocab(with_added_tokens=True)
    names = {i: name for name, i in vocab.items() if i in begin + end}
    opening = [{"SpecialToken": {"id": names[i], "type_id": 0}} for i in begin]
    closing = [{"SpecialToken": {"id": names[i], "type_id": 0}} for i in end]
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [*opening, first, *closing],
        "pair": [*opening, first, *closing, second, *closing],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in names.items()},
    }
    return spec | {"post_processor": template if begin or end else None}


def frame_of(made: Any) -> tuple[list[int], list[int]]:
    """The ids that an engine puts before and after every text."""
    if made.post_processor is None:
        return [], []
    empty, text = (made.encode(content, add_special_tokens=True).ids for content in ("", "a"))
    begin = next((i for i, pair in enumerate(zip(empty, text, strict=False)) if pair[0] != pair[1]), len(empty))
    return empty[:begin], empty[begin:]


def canonical(spec: dict[str, Any]) -> dict[str, Any]:
    """As the engine writes it, with all defaults filled in."""
    complete: dict[str, Any] = json.loads(make_engine(json.dumps(spec)).to_str())
    return complete


def same_unigram_score(spec: dict[str, Any], ids: list[int], others: list[int]) -> bool:
    """Whether a Unigram model scores two segmentations of a text equally: SentencePiece sums in single precision."""
    if spec["model"].get("type") != "Unigram":
        return False
    vocab = spec["model"]["vocab"]
    name = lambda i: vocab[i][0] if i < len(vocab) else ""  # noqa: E731
    if "".join(map(name, ids)) != "".join(map(name, others)):
        return False
    one, other = (sum(vocab[i][1] for i in cut if not BYTE_PIECE.fullmatch(name(i))) for cut in (ids, others))
    return bool(np.isclose(one, other, rtol=1e-6, atol=1e-4))
