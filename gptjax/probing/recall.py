"""Recall by distance: does a model still know what it has read so many tokens ago?

The text is made for it: pairs without end of a key and its value, "#S'k!8#S*y...". Every key has values of its own, of
which each text draws one, so that nothing but an earlier pair of the text tells the value of a key. A question ends
with a key that stands once before; its value is the answer. Only the key's values may be answered, so that whoever does
not remember is right in 1 of 8 cases, whatever the model and the distance. It is the associative recall of Ba et al.
(2016) and Arora et al. (2023) made so easy that small models learn it in minutes: as values belong to one key,
one look back is enough, where they must be told apart by the key beside them it takes two (Olsson et al. 2022).
"""

from collections.abc import Sequence

import numpy as np

from gptjax import random_streams
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import PromptError
from gptjax.inference.pretrained import Pretrained
from gptjax.probing.cloze import ClozeItem, predict_left_to_right

KEYS = [chr(33 + key) for key in range(10)]
VALUES = [[chr(43 + 8 * key + value) for value in range(8)] for key in range(10)]  # of each key
CHANCE = 1 / 8


def document(seed: int, index: int, pairs: int) -> str:
    """Text to learn from: pairs of random keys. A pure function of its arguments, as `question` is."""
    rng = np.random.default_rng((seed, random_streams.RECALL_DOCUMENT, index))
    values = rng.integers(8, size=len(KEYS))
    return _spelt(rng.integers(len(KEYS), size=pairs), values)


def question(seed: int, index: int, distance: int, length: int) -> str:
    """A text of `length` characters whose last is the answer, and stands `distance` before as well, after its key.

    Distances and lengths are even. The pairs between and before have other keys, as in training those between two
    pairs of one key have. A fact that would stand before the text's beginning makes the text so much longer.
    """
    assert distance > 0 and distance % 2 == length % 2 == 0, "pairs are two characters long"
    rng = np.random.default_rng((seed, random_streams.RECALL_QUESTION, index, distance))
    values = rng.integers(8, size=len(KEYS))
    asked, *others = rng.permutation(len(KEYS))
    keys = rng.choice(others, max(length, distance + 2) // 2)
    keys[[-1 - distance // 2, -1]] = asked
    return _spelt(keys, values)


def _spelt(keys: np.ndarray, values: np.ndarray) -> str:
    return "".join(KEYS[key] + VALUES[key][values[key]] for key in keys)


def recall(
    pretrained: Pretrained, distances: Sequence[int], count: int, length: int, seed: int, batch_size: int = 32
) -> np.ndarray:
    """Whether `count` questions at each distance (even, in tokens) are answered right: bool [distances, count].

    Texts have `length` tokens, or as many more as the distance needs. Raises `PromptError` for a tokenizer that does
    not give every character a token of its own, and for texts beyond a table of positions.
    """
    values = {key: _encoded(pretrained.tokenizer, "".join(own)) for key, own in zip(KEYS, VALUES, strict=True)}
    right = []
    for distance in distances:
        texts = [question(seed, i, distance, length) for i in range(count)]
        gaps = [ClozeItem(ids, len(ids) - 1) for ids in (_encoded(pretrained.tokenizer, text) for text in texts)]
        allowed = np.stack([values[text[-2]] for text in texts])
        answers = predict_left_to_right(pretrained, gaps, allowed, batch_size)
        right.append(answers == [gap.truth for gap in gaps])
    return np.array(right)


def _encoded(tokenizer: Tokenizer, text: str) -> np.ndarray:
    ids = tokenizer.encode(text)
    if len(ids) != len(text):
        raise PromptError(
            f"a {tokenizer.kind} tokenizer makes {len(ids)} tokens of the {len(text)} characters {text[:8]!r}...; "
            "recall is measured on models whose characters are tokens: data.tokenizer = 'byte' or 'char'"
        )
    return ids
