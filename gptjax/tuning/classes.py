"""What a model with a head for classes answers on a task: a label for the prompt, or one for each word of it."""

from collections.abc import Iterator, Sequence

import numpy as np

from gptjax.data.examples import token_classes
from gptjax.data.tasks import Example, Task
from gptjax.errors import DataError
from gptjax.inference.classes import ClassQuery, class_log_probs
from gptjax.inference.pretrained import Pretrained

Told = tuple[str, float, int, bool]  # the answer as text, nats of the true labels, how many they are, text shortened


def check_labels(pretrained: Pretrained, task: Task) -> None:
    """Raises `DataError` where a model tells other classes than a task asks for."""
    if pretrained.labels != task.classes:
        asked = f"the labels {', '.join(task.classes)}" if task.classes else "text"
        raise DataError(
            f"{pretrained.name}: tells {', '.join(pretrained.labels)}, and task:{task.name} asks for {asked}; take a "
            "model that was trained on this task"
        )


def tell(
    pretrained: Pretrained, task: Task, examples: Sequence[Example], batch_size: int, dtype: str | None = None
) -> Iterator[Told]:
    """The likeliest labels of examples that hold the true ones, as the task's answers in text.

    Of a text longer than the context the end is read, as in training. Raises `DataError` where labels stand before.
    """
    pieces = [pretrained.tokenizer.encode_parts([part.text for part in example.parts]) for example in examples]
    truths = [token_classes(example, own, pretrained.labels) for example, own in zip(examples, pieces, strict=True)]
    starts = [max(len(truth) - pretrained.model.context_length, 0) for truth in truths]
    for example, truth, start in zip(examples, truths, starts, strict=True):
        if (truth[:start] >= 0).any():
            raise DataError(
                f"{example.where}: its labelled words are {len(truth)} tokens long, and the context of "
                f"{pretrained.name} holds {pretrained.model.context_length}; take a model with a longer context"
            )
    asked = [np.flatnonzero(truth >= 0) for truth in truths]
    questions = [
        ClassQuery(np.concatenate(own)[start:].astype(np.int32), places - start)
        for own, places, start in zip(pieces, asked, starts, strict=True)
    ]
    for example, truth, places, start, told in zip(
        examples, truths, asked, starts, class_log_probs(pretrained, questions, batch_size, dtype), strict=True
    ):
        labels = [pretrained.labels[i] for i in told.argmax(-1)]
        answer = task.tagging.answer(example.values, labels) if task.tagging else labels[0]
        nats = -told[np.arange(len(places)), truth[places]].sum(dtype=np.float64)
        yield answer, float(nats), len(places), start > 0
