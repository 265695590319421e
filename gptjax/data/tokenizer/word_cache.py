"""Byte-level BPE with a cache of words: a text is split by the tokenizer's pattern, and each word is encoded once.

BPE never merges across the splits of its pattern, so the ids of a text are those of its words, concatenated. The engine
splits 1.5 to 2 MB/s of text on a core, `regex` 10 MB/s, and most words repeat.
"""

from itertools import chain
from typing import Any

import numpy as np

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # the pattern of ByteLevel
BEFORE = "aA1! \n'字"  # one character of each class that patterns distinguish
MAX_WORDS = 1 << 18  # in the cache, about 50 MB


def pattern_of(spec: dict[str, Any]) -> str | None:
    """The split pattern of a tokenizer.json; None if it does anything else to a text before the BPE."""
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


class WordCache:
    """Encodes like `engine`, a `tokenizers.Tokenizer` that splits by `pattern`, but faster.

    `regex` and `tokenizers` have different versions of Unicode, so each new character is tested once with both.
    """

    def __init__(self, pattern: str, engine: Any):
        """Raises `ValueError` for a pattern that `regex` cannot compile, or that has groups."""
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
        self._engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # no splits
        self._ids: dict[str, list[int]] = {}
        self._agrees: dict[str, bool] = {}  # tested characters: whether both libraries split alike

    def encode(self, text: str) -> np.ndarray | None:
        """int32 ids of a text; None if the libraries split differently at one of its characters."""
        characters = set(text)
        for c in characters - self._agrees.keys():
            self._agrees[c] = self._test(c)
        if not all(map(self._agrees.__getitem__, characters)):
            return None
        words = self._pattern.findall(text)
        if sum(map(len, words)) != len(text):  # the pattern skips some characters
            return None
        if len(self._ids) > MAX_WORDS:
            self._ids = {}
        known = self._ids  # a local name: another thread may replace the cache
        new = list(set(words) - known.keys())
        known.update((word, encoded.ids) for word, encoded in zip(new, self._encode(new), strict=True))
        return np.fromiter(chain.from_iterable(map(known.__getitem__, words)), np.int32)

    def _encode(self, words: list[str]) -> list[Any]:
        return self._engine.encode_batch_fast(words, add_special_tokens=False)

    def _test(self, c: str) -> bool:
        """Whether both libraries split alike around a character."""
        text = "".join(before + c for before in BEFORE) + "s"
        cuts = [span for _, span in self._cutter.pre_tokenize_str(text)]
        return cuts == [match.span() for match in self._pattern.finditer(text)]
