"""What the model is asked to do with a window of text. Every objective makes a `Batch`, which is all that the
train step ever sees."""

from typing import NamedTuple

import numpy as np
from jax import Array


class Windows(NamedTuple):
    """Pieces of a stream, one token longer than the model's input, padded at the end."""

    ids: np.ndarray  # int32 [rows, length + 1]
    valid: np.ndarray  # bool [rows, length + 1]: false in the padding
    documents: np.ndarray | None  # int32 [rows, length + 1]: which document each token is in, counted from 1


class Batch(NamedTuple):
    """One update's worth of work: [rows, length] on the host, [microbatches, rows, length] on the devices."""

    tokens: np.ndarray | Array  # int32: what the model reads
    targets: np.ndarray | Array  # int32: what it should say at each place
    weights: np.ndarray | Array  # float32: how much each answer counts; 0 in the padding
    segments: np.ndarray | Array | None = None  # int32: tokens see their own segment only; None: the whole row
    positions: np.ndarray | Array | None = None  # int32: place within the segment; None: within the row


def causal(windows: Windows) -> Batch:
    """Predict the next token. With documents, the first token of one is never asked from the end of another."""
    ids, valid, documents = windows
    weights = valid[:, 1:] & valid[:, :-1]
    if documents is None:
        return Batch(ids[:, :-1], ids[:, 1:], weights.astype(np.float32))
    documents = np.where(valid, documents, 0)
    weights &= documents[:, 1:] == documents[:, :-1]
    segments = documents[:, :-1]
    return Batch(ids[:, :-1], ids[:, 1:], weights.astype(np.float32), segments, positions_within(segments))


def positions_within(segments: np.ndarray) -> np.ndarray:
    """For each token, how many tokens of its segment stand before it in the row: int32 [rows, length]."""
    places = np.arange(segments.shape[1], dtype=np.int32)
    begins = np.ones(segments.shape, bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - np.maximum.accumulate(np.where(begins, places, 0), axis=1, dtype=np.int32)


OBJECTIVES = {"causal": causal}
