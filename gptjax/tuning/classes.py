"""The predictions of a classifier on a task: a label for the prompt, or one for each word of it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.data.examples import token_classes
from gptjax.data.tasks import Example, Task
from gptjax.errors import DataError
from gptjax.inference.classes import ClassQuery, class_log_probs
from gptjax.inference.pretrained import Pretrained


class ScoredAnswer(NamedTuple):
    """A model's answer to an example, and the loss of the true answer."""

    text: str
    nll: float  # of the true tokens or labels, summed, in nats
    num_targets: int  # these tokens or labels
    shortened: bool  # the model saw the end of the prompt only


def check_labels(pretrained: Pretrained, task: Task) -> None:
    """Raises `DataError` if a classifier was trained on other labels than those of the task."""
    if pretrained.labels != task.classes:
        expected = f"the labels {', '.join(task.classes)}" if task.classes else "text"
        raise DataError(
            f"{pretrained.name}: predicts {', '.join(pretrained.labels)}, but task:{task.name} expects {expected}; use "
            "a model that was trained on this task"
        )


def classify(
    pretrained: Pretrained, task: Task, examples: Sequence[Example], batch_size: int, dtype: str | None = None
) -> Iterator[ScoredAnswer]:
    """The most probable labels of examples with true labels, as the task's answers in text.

    Of a text longer than the context the end is used, as in training. Raises `DataError` if a label is before that.
    """
    pieces = [pretrained.tokenizer.encode_parts([part.text for part in example.parts]) for example in examples]
    truths = [token_classes(example, own, pretrained.labels) for example, own in zip(examples, pieces, strict=True)]
    starts = [max(len(truth) - pretrained.model.context_length, 0) for truth in truths]
    for example, truth, start in zip(examples, truths, starts, strict=True):
        if (truth[:start] >= 0).any():
            raise DataError(
                f"{example.where}: its labelled words are {len(truth)} tokens long, and the context of "
                f"{pretrained.name} is {pretrained.model.context_length}; use a model with a longer context"
            )
    positions = [np.flatnonzero(truth >= 0) for truth in truths]
    queries = [
        ClassQuery(np.concatenate(own)[start:].astype(np.int32), own_positions - start)
        for own, own_positions, start in zip(pieces, positions, starts, strict=True)
    ]
    results = class_log_probs(pretrained, queries, batch_size, dtype)
    for example, truth, own_positions, start, log_probs in zip(
        examples, truths, positions, starts, results, strict=True
    ):
        labels = [pretrained.labels[i] for i in log_probs.argmax(-1)]
        answer = task.tagging.answer(example.values, labels) if task.tagging else labels[0]
        nll = -log_probs[np.arange(len(own_positions)), truth[own_positions]].sum(dtype=np.float64)
        yield ScoredAnswer(answer, float(nll), len(own_positions), start > 0)
