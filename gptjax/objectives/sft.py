"""Supervised fine-tuning: predict the tokens of the answers, or the class labels of the examples."""

from collections.abc import Iterator

import numpy as np

from gptjax.data.batches import Batch, Generators, MakeBatch
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.windows import Windows
from gptjax.errors import DataError
from gptjax.objectives.base import Objective
from gptjax.objectives.causal import causal_batch
from gptjax.objectives.losses import Loss, class_loss, token_loss
from gptjax.objectives.reference import ReferenceModel


class SFT(Objective):
    """Predicts the answers of examples. With data.answers = "classes" a classification head predicts their labels."""

    needs_answers = True
    predicts_classes = True

    def batch_maker(self, tokenizer: Tokenizer) -> MakeBatch:
        return answer_batch

    def loss(self, reference: ReferenceModel | None) -> Loss:
        if self.experiment.model.num_classes:
            return class_loss()
        return token_loss(self.config.z_loss)

    def is_token_nll(self) -> bool:
        return self.experiment.model.num_classes == 0

    def problems(self) -> Iterator[str]:
        e = self.experiment
        if e.data.answers != "classes":
            return
        if self.config.z_loss != 0:
            yield f"objective.z_loss = {self.config.z_loss}: has no effect with data.answers = 'classes'; leave it out"
        if e.data.prompt is not None and len(e.data.labels) < 2:
            yield f"data.labels = {e.data.labels}: data.answers = 'classes' needs at least two labels; name all of them"
        if e.train.sample_tokens != 0:
            yield (
                f"train.sample_tokens = {e.train.sample_tokens}: a classifier (data.answers = 'classes') cannot "
                "generate text; set 0"
            )


def answer_batch(windows: Windows, rngs: Generators = (), negatives: Windows | None = None) -> Batch:
    """The tokens of the answers are predicted; or the class at each token that has one.

    Raises `DataError` for text without answers.
    """
    if windows.loss_mask is None:
        raise DataError("objective.name: the text has no answers; use 'causal', or set data.prompt and data.answer")
    batch = causal_batch(windows)
    if windows.classes is None:
        return batch._replace(loss_weights=batch.loss_weights * windows.loss_mask[:, 1:])
    classes = windows.classes[:, :-1].astype(np.int32)
    return batch._replace(targets=np.maximum(classes, 0), loss_weights=(classes >= 0).astype(np.float32))


def answer_or_text_batch(windows: Windows, rngs: Generators = (), negatives: Windows | None = None) -> Batch:
    """`answer_batch` if the windows have answers, else `causal_batch`."""
    return causal_batch(windows) if windows.loss_mask is None else answer_batch(windows)
