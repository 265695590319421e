"""Prefix LM (Raffel et al. 2020): read the beginning of each text in both directions and predict the rest."""

import numpy as np

from gptjax.data.batches import Batch, Generators, MakeBatch
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.windows import Windows
from gptjax.objectives.base import Objective
from gptjax.objectives.sft import answer_or_text_batch


class PrefixLM(Objective):
    """Attends in both directions within a prefix of each text and predicts the tokens after it."""

    masks_plain_text = True

    def batch_maker(self, tokenizer: Tokenizer) -> MakeBatch:
        return prefix_batch


def prefix_batch(windows: Windows, rngs: Generators, negatives: Windows | None = None) -> Batch:
    """The prefix of an example ends before its first answer, and the answers are predicted.

    In text without answers the prefix has a uniformly random length, with at least one token on either side. Texts are
    documents, or rows if documents are not tracked.
    """
    prefix = np.zeros(windows.ids.shape, bool)
    for row, rng in zip(range(len(prefix)), rngs, strict=True):
        for first, last in windows.texts(row):
            if windows.loss_mask is None:
                end = first + int(rng.integers(1, max(last - first, 2)))
            else:
                end = first + int(np.append(windows.loss_mask[row, first:last], True).argmax())
            prefix[row, first:end] = True
    batch = answer_or_text_batch(windows)
    return batch._replace(loss_weights=batch.loss_weights * ~prefix[:, 1:], prefix_mask=prefix[:, :-1])
