"""Recall by distance: does a model still know what it has read a given number of tokens ago?

The text is synthetic: an endless sequence of key-value pairs, "#S'k!8#S*y...". Every key has its own set of values, and
each text samples one of them, so that only an earlier pair of the text determines the value of a key. A question ends
with a key that occurs once before; its value is the answer. Only values of that key are allowed as an answer, so that a
model without memory is right in 1 of 8 cases, at any distance. It is the associative recall of Ba et al. (2016) and
Arora et al. (2023), made so easy that small models learn it in minutes: because every value belongs to one key, one
lookup is enough; with shared values it takes two (Olsson et al. 2022).
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
    """A training text: pairs of random keys. A pure function of its arguments, as `question` is."""
    rng = np.random.default_rng((seed, random_streams.RECALL_DOCUMENT, index))
    values = rng.integers(8, size=len(KEYS))
    return _to_text(rng.integers(len(KEYS), size=pairs), values)


def question(seed: int, index: int, distance: int, length: int) -> str:
    """A text of `length` characters whose last is the answer; the answer also occurs `distance` before, after its key.

    Distances and lengths are even. All other pairs have other keys. The text is longer than `length` if the distance
    needs it.
    """
    assert distance > 0 and distance % 2 == length % 2 == 0, "pairs are two characters long"
    rng = np.random.default_rng((seed, random_streams.RECALL_QUESTION, index, distance))
    values = rng.integers(8, size=len(KEYS))
    key, *others = rng.permutation(len(KEYS))
    keys = rng.choice(others, max(length, distance + 2) // 2)
    keys[[-1 - distance // 2, -1]] = key
    return _to_text(keys, values)


def _to_text(keys: np.ndarray, values: np.ndarray) -> str:
    return "".join(KEYS[key] + VALUES[key][values[key]] for key in keys)


def recall(
    pretrained: Pretrained, distances: Sequence[int], count: int, length: int, seed: int, batch_size: int = 32
) -> np.ndarray:
    """Whether `count` questions at each distance (even, in tokens) are answered correctly: bool [distances, count].

    Texts have `length` tokens, or more if the distance needs it. Raises `PromptError` for a tokenizer that does not
    encode every character as one token, and for texts longer than the learned positions.
    """
    values = {key: _encode(pretrained.tokenizer, "".join(own)) for key, own in zip(KEYS, VALUES, strict=True)}
    correct = []
    for distance in distances:
        texts = [question(seed, i, distance, length) for i in range(count)]
        items = [ClozeItem(ids, len(ids) - 1) for ids in (_encode(pretrained.tokenizer, text) for text in texts)]
        allowed = np.stack([values[text[-2]] for text in texts])
        answers = predict_left_to_right(pretrained, items, allowed, batch_size)
        correct.append(answers == [item.target for item in items])
    return np.array(correct)


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    ids = tokenizer.encode(text)
    if len(ids) != len(text):
        raise PromptError(
            f"a {tokenizer.kind} tokenizer makes {len(ids)} tokens of the {len(text)} characters {text[:8]!r}...; "
            "recall needs a tokenizer with one token per character: data.tokenizer = 'byte' or 'char'"
        )
    return ids
