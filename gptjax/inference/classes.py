"""What a model with a head for classes tells of texts: how likely each class is, at the tokens that are asked about."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from gptjax import config
from gptjax.inference.cache import bucket, rolls
from gptjax.inference.engine import set_up
from gptjax.inference.pretrained import Pretrained
from gptjax.model.gpt import GPT


class Question(NamedTuple):
    """A text, and the tokens at which a class is told."""

    ids: np.ndarray  # int32 [n], n at most the context
    places: np.ndarray  # int [k]


def log_probabilities(
    pretrained: Pretrained, questions: Sequence[Question], batch_size: int = 8, dtype: str | None = None
) -> list[np.ndarray]:
    """ln of the probability of every class at the places of each text: float32 [k, classes] each, in their order.

    Texts are read `batch_size` at a time, the longest first, in `dtype` (as for `set_up`).
    """
    model, params = set_up(pretrained, dtype)
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].ids), reverse=True)
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = bucket(len(questions[chosen[0]].ids))
        width = width if rolls(model) else min(width, model.context_length)
        tokens, segments = np.zeros((2, batch_size, width), np.int32)
        for row, i in enumerate(chosen):
            tokens[row, : len(questions[i].ids)] = questions[i].ids
            segments[row, : len(questions[i].ids)] = 1  # or a model that looks ahead would see the padding
        told = np.asarray(_read(params, tokens, segments, model=model))
        found |= {i: told[row, questions[i].places] for row, i in enumerate(chosen)}
    return [found[i] for i in range(len(questions))]


@partial(jax.jit, static_argnames="model")
def _read(params: Any, tokens: Array, segments: Array, *, model: config.ModelConfig) -> Array:
    """tokens and segments [B, L] -> float32 log-probabilities [B, L, classes]."""
    logits: Any = GPT(model).apply({"params": params}, tokens, segments=segments)
    return jax.nn.log_softmax(logits)
