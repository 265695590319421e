"""The class probabilities that a classifier gives to texts, at chosen tokens."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from gptjax.config import ModelConfig
from gptjax.inference.cache import padded_length
from gptjax.inference.engine import prepare_for_inference
from gptjax.inference.pretrained import Pretrained
from gptjax.model.gpt import GPT, Params


class ClassQuery(NamedTuple):
    """A text, and the tokens at which its class is predicted."""

    ids: np.ndarray  # int32 [n], n at most the context
    positions: np.ndarray  # int [k]


def class_log_probs(
    pretrained: Pretrained, queries: Sequence[ClassQuery], batch_size: int = 8, dtype: str | None = None
) -> list[np.ndarray]:
    """The log-probabilities of all classes at the positions of each query: float32 [k, classes] each, in their order.

    Texts are computed in batches of `batch_size`, the longest first, in `dtype` (as for `prepare_for_inference`).
    """
    config, params = prepare_for_inference(pretrained, dtype)
    order = sorted(range(len(queries)), key=lambda i: len(queries[i].ids), reverse=True)
    results: dict[int, np.ndarray] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        length = padded_length(config, len(queries[batch[0]].ids))
        tokens, segment_ids = np.zeros((2, batch_size, length), np.int32)
        for row, i in enumerate(batch):
            tokens[row, : len(queries[i].ids)] = queries[i].ids
            segment_ids[row, : len(queries[i].ids)] = 1  # keeps a bidirectional model from attending to the padding
        log_probs = np.asarray(_log_probs(params, tokens, segment_ids, config=config))
        results |= {i: log_probs[row, queries[i].positions] for row, i in enumerate(batch)}
    return [results[i] for i in range(len(queries))]


@partial(jax.jit, static_argnames="config")
def _log_probs(
    params: Params, tokens: Int[Array, "batch length"], segment_ids: Int[Array, "batch length"], *, config: ModelConfig
) -> Float[Array, "batch length classes"]:
    logits: Any = GPT(config).apply({"params": params}, tokens, segment_ids=segment_ids)
    return jax.nn.log_softmax(logits)
