"""Fine-tuning tasks. Each task is one file here that defines `TASK`, and is a source by its name: `task:NAME`.

A task defines where its rows are, how a row becomes prompt and answer, and its metrics. The real data is in the folder
$GPTJAX_DATA.
"""

import collections
import difflib
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Literal, NamedTuple

from gptjax.data.corpus import hash_fraction
from gptjax.errors import DataError

Split = Literal["train", "validation", "test"]
Rows = Iterator[tuple[dict[str, str], str]]  # the columns of a row, and its file and line
Metric = Literal["accuracy", "f1", "rouge_l", "rouge_1", "rouge_2", "bleu", "chrf", "exact_match", "edit_distance"]
Baseline = Literal["majority", "copy", "lead"]


class TextPart(NamedTuple):
    """A part of an example's text."""

    text: str
    is_target: bool  # trained on; False: context only
    label: str | None = None  # the class at its last token; None: no class


@dataclass(frozen=True)
class Example:
    """A prompt with its answer, a dialogue, or words with labels."""

    parts: tuple[TextPart, ...]  # in order: prompt and answer, turns of a dialogue, or words with labels
    where: str  # file and line or row, for messages
    references: tuple[str, ...] = ()  # all correct answers to the last prompt; (): only the answer
    values: Mapping[str, str] = field(default_factory=dict)  # the columns of its row

    @property
    def prompt(self) -> str:
        """The text before the last target part; all of it if the targets are labels."""
        return "".join(part.text for part in self.parts[: self._last])

    @property
    def answer(self) -> str:
        """The last target part, with its leading space if there is one."""
        return self.parts[self._last].text

    @property
    def _last(self) -> int:
        return max((i for i, part in enumerate(self.parts) if part.is_target), default=len(self.parts))


@dataclass(frozen=True)
class Tagging:
    """Token classification: how a row becomes words with labels, and how labels become the answer as text."""

    labels: tuple[str, ...]  # of words
    parts: Callable[[Mapping[str, str]], tuple[TextPart, ...]]  # row -> its words, each with its label
    answer: Callable[[Mapping[str, str], Sequence[str]], str]  # row, one label for each word -> the answer as text


@dataclass(frozen=True)
class Task:
    """A task: its data, its prompt and answer, and its metrics."""

    name: str
    summary: str  # the instruction, in one line
    load_rows: Callable[[Split, Path], Rows]  # the path is that of $GPTJAX_DATA
    prompt: str  # template: text and {columns}
    answer: str  # the same
    metrics: tuple[Metric, ...]  # the first one is the main metric
    baseline: Baseline  # see `baseline`
    source: str | None  # where to get the real data; None: `load_rows` generates it
    licence: str  # of the real data
    labels: tuple[str, ...] = ()  # all possible answers; (): any text
    max_new_tokens: int = 64  # of an answer: its bytes, because no tokenizer needs more
    references: str | None = None  # a column with several correct answers, one on each line
    parts: Callable[[Mapping[str, str]], tuple[TextPart, ...]] | None = None  # row -> parts, instead of the templates
    tagging: Tagging | None = None  # for data.answers = "classes"; None: the prompt has one label

    @property
    def classes(self) -> tuple[str, ...]:
        """The class labels with data.answers = "classes"; (): answers are text only."""
        return self.tagging.labels if self.tagging else self.labels


def find_task(name: str) -> Task:
    """The task of this name. Raises `DataError` with the nearest name and all names."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise DataError(f"task:{name}: no such task; {hint}There are {', '.join(TASKS)}")


def columns(template: str) -> list[str]:
    """The names between a template's braces, in order."""
    return [name for _, name, *_ in Formatter().parse(template) if name is not None]


def split_of(text: str) -> Split:
    """The split of a row, by a hash of its text: a tenth each for test and validation."""
    tenth = hash_fraction(" ".join(text.casefold().split())) * 10
    return "test" if tenth < 1 else "validation" if tenth < 2 else "train"


def baseline(task: Task, train: Iterable[Example]) -> Callable[[Example], str]:
    """The baseline of a task: a function from an example to an answer.

    majority: the most common training answer ("none" for entities); copy: the input; lead: its first sentence. The
    input is the first column of the prompt.
    """
    if task.baseline == "majority":
        common = collections.Counter(example.answer.strip() for example in train).most_common(1)[0][0]
        return lambda example: common
    column = columns(task.prompt)[0]
    if task.baseline == "copy":
        return lambda example: example.values[column]
    return lambda example: re.split(r"(?<=[.!?])\s", example.values[column], maxsplit=1)[0]


_MODULES = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _MODULES}
