"""Predict the next token."""

import numpy as np

from gptjax.data.batches import Batch, Generators, MakeBatch, positions_within
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.windows import Windows
from gptjax.objectives.base import Objective


class Causal(Objective):
    """Predicts the next token of plain text."""

    def batch_maker(self, tokenizer: Tokenizer) -> MakeBatch:
        return causal_batch


def causal_batch(windows: Windows, rngs: Generators = (), negatives: Windows | None = None) -> Batch:
    """Every token is predicted from those before it; the first token of a document is not predicted."""
    ids, valid = windows.ids, windows.valid
    inputs, targets = ids[:, :-1], ids[:, 1:]
    weights = valid[:, 1:] & valid[:, :-1]
    if windows.document_ids is None:
        return Batch(inputs, targets, weights.astype(np.float32))
    documents = np.where(valid, windows.document_ids, 0)
    weights &= documents[:, 1:] == documents[:, :-1]
    segments = documents[:, :-1]
    return Batch(inputs, targets, weights.astype(np.float32), segments, positions_within(segments))
