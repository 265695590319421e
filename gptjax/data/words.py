"""Byte-level BPE word by word: a text is cut by the tokenizer's own pattern, and a word is encoded once.

A BPE joins nothing that its pattern cuts apart, so that the ids of a text are those of its words, one after the other.
The engine cuts 1.5 to 2 MB of text a second on a core, `regex` 10, and most words have been seen before.
"""

from itertools import chain
from typing import Any

import numpy as np

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel cuts by
BEFORE = "aA1! \n'字"  # a character of each kind that patterns tell apart
MOST_WORDS = 1 << 18  # kept with their ids, some 50 MB


def pattern_of(spec: dict[str, Any]) -> str | None:
    """The pattern by which a tokenizer.json cuts a text; None where it does anything else to a text before the BPE."""
    steps = spec.get("pre_tokenizer") or {}
    *before, last = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    literal = any(not token["special"] for token in spec.get("added_tokens") or [])
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True)
    if literal or not plain or spec.get("normalizer") or spec["model"].get("dropout"):
        return None
    if last.get("use_regex", True):
        return None if before else GPT2
    match before:
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]:
            return pattern
    return None


class Words:
    """The ids of texts by `pattern`, the same as those of `engine`, a `tokenizers.Tokenizer` that cuts by it as well.

    The two libraries know Unicode as of different years. So each new character is tried once with both.
    """

    def __init__(self, pattern: str, engine: Any):
        """Raises `ValueError` for a pattern that `regex` does not read, or of which it would give parts."""
        import regex
        from tokenizers import pre_tokenizers

        try:
            self._pattern = regex.compile(pattern)
        except regex.error as e:
            raise ValueError(str(e)) from None
        if self._pattern.groups:
            raise ValueError("it has groups")
        self._cutter = engine.pre_tokenizer
        self._engine = type(engine).from_str(engine.to_str())
        self._engine.encode_special_tokens = True
        self._engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # nothing is cut
        self._known: dict[str, list[int]] = {}
        self._alike: dict[str, bool] = {}  # characters that were tried

    def encode(self, text: str) -> np.ndarray | None:
        """int32 ids of a text; None where it has a character around which the libraries cut differently."""
        characters = set(text)
        for c in characters - self._alike.keys():
            self._alike[c] = self._try(c)
        if not all(map(self._alike.__getitem__, characters)):
            return None
        words = self._pattern.findall(text)
        if sum(map(len, words)) != len(text):  # the pattern leaves something between words
            return None
        if len(self._known) > MOST_WORDS:
            self._known = {}
        known = self._known  # of this call: another thread may begin anew
        new = list(set(words) - known.keys())
        known.update((word, made.ids) for word, made in zip(new, self._encoded(new), strict=True))
        return np.fromiter(chain.from_iterable(map(known.__getitem__, words)), np.int32)

    def _encoded(self, words: list[str]) -> list[Any]:
        return self._engine.encode_batch_fast(words, add_special_tokens=False)

    def _try(self, c: str) -> bool:
        text = "".join(before + c for before in BEFORE) + "s"
        cuts = [place for _, place in self._cutter.pre_tokenize_str(text)]
        return cuts == [match.span() for match in self._pattern.finditer(text)]
