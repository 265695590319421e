"""What a GPT is fine-tuned for: each task one file here that defines `TASK`, found by its name as `task:NAME`.

A task says where its rows are, how a row becomes prompt and answer, and what counts. The real data lies in the folder
that $GPTJAX_DATA names.
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
Rows = Iterator[tuple[dict[str, str], str]]  # the columns of each, and the file and line they come from
Metric = Literal["accuracy", "f1", "rouge_l", "rouge_1", "rouge_2", "bleu", "chrf", "exact_match", "edit_distance"]
Baseline = Literal["majority", "copy", "lead"]


class TextPart(NamedTuple):
    """A piece of an example's text."""

    text: str
    is_target: bool  # to be learnt, not only read
    label: str | None = None  # the class that is told at its last token; None: none is


@dataclass(frozen=True)
class Example:
    """What a model is shown and what it is asked for."""

    parts: tuple[TextPart, ...]  # one after the other: prompt and answer, the turns of a dialogue, or words with labels
    where: str  # file and line, or row, for messages
    references: tuple[str, ...] = ()  # all right answers to the last prompt; (): the answer is the only one
    values: Mapping[str, str] = field(default_factory=dict)  # the columns it was made of

    @property
    def prompt(self) -> str:
        """The text before the last part that is asked for; all of it where labels are asked for."""
        return "".join(part.text for part in self.parts[: self._last])

    @property
    def answer(self) -> str:
        """The last part that is asked for, with the space it may begin with."""
        return self.parts[self._last].text

    @property
    def _last(self) -> int:
        return max((i for i, part in enumerate(self.parts) if part.is_target), default=len(self.parts))


@dataclass(frozen=True)
class Tagging:
    """How a row is answered by a label for each of its words (token classification), beside the answer as text."""

    labels: tuple[str, ...]  # all that there are
    parts: Callable[[Mapping[str, str]], tuple[TextPart, ...]]  # of a row: its words, each with its label
    answer: Callable[[Mapping[str, str], Sequence[str]], str]  # of a row and a label a word: the answer as text


@dataclass(frozen=True)
class Task:
    """One use of a language model: its data, its form as text, and its measure."""

    name: str
    summary: str  # what is asked, in one line
    load_rows: Callable[[Split, Path], Rows]  # from the folder that $GPTJAX_DATA names
    prompt: str  # template: text and {columns}
    answer: str  # the same
    metrics: tuple[Metric, ...]  # the first is the one that counts
    baseline: Baseline  # the trivial answer to beat, see `baseline`
    source: str | None  # where the real data is from; None: `load_rows` makes it
    licence: str  # of the real data
    labels: tuple[str, ...] = ()  # the only answers there are; (): any
    max_new_tokens: int = 64  # room for an answer, in bytes: no tokenizer needs more
    references: str | None = None  # a column with one right answer a line, where there are several
    parts: Callable[[Mapping[str, str]], tuple[TextPart, ...]] | None = None  # of a row that the templates cannot express
    tagging: Tagging | None = None  # with data.answers = "classes", where words have labels; None: the prompt has one

    @property
    def classes(self) -> tuple[str, ...]:
        """What a model tells with data.answers = "classes"; (): answers are text only."""
        return self.tagging.labels if self.tagging else self.labels


def find_task(name: str) -> Task:
    """The task of this name. Raises `DataError` with the nearest name and all there are."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise DataError(f"task:{name}: no such task; {hint}There are {', '.join(TASKS)}")


def columns(template: str) -> list[str]:
    """The names between a template's braces, in order."""
    return [name for _, name, *_ in Formatter().parse(template) if name is not None]


def split_of(text: str) -> Split:
    """Where a row with this text belongs: a tenth each for test and validation. The same text, the same split."""
    tenth = hash_fraction(" ".join(text.casefold().split())) * 10
    return "test" if tenth < 1 else "validation" if tenth < 2 else "train"


def baseline(task: Task, train: Iterable[Example]) -> Callable[[Example], str]:
    """The trivial answerer that a model must beat.

    majority: the most common of the training answers ("none" for entities); copy: the input; lead: its first sentence.
    The input is the first column of the prompt.
    """
    if task.baseline == "majority":
        common = collections.Counter(example.answer.strip() for example in train).most_common(1)[0][0]
        return lambda example: common
    shown = columns(task.prompt)[0]
    if task.baseline == "copy":
        return lambda example: example.values[shown]
    return lambda example: re.split(r"(?<=[.!?])\s", example.values[shown], maxsplit=1)[0]


_MODULES = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _MODULES}
