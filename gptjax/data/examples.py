"""Examples of prompts and answers: from a task, or from any table with two templates.

A template is text with column names in braces. Rows that cannot be used are reported before training, the first few
together, each with its file and line.
"""

import dataclasses
import difflib
import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np

from gptjax.config import DataConfig
from gptjax.data import corpus
from gptjax.data.tasks import Example, Rows, Split, Task, TextPart, columns, find_task
from gptjax.errors import DataError, warn

SAMPLES = Path(__file__).parent / "tasks" / "samples"  # in the layout of the real data
MAX_REPORTED = 5  # problems that are reported together
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def holds_examples(data: DataConfig) -> bool:
    """Whether the sources are prompts and answers, not plain text."""
    sources = (data.source,) if isinstance(data.source, str) else data.source
    return data.prompt is not None or any(source.startswith("task:") for source in sources)


def load_examples(source: str, data: DataConfig, split: Split) -> Iterator[Example]:
    """The examples of one split of `task:NAME`, or of a table with `data.prompt` and `data.answer`, in a fixed order.

    A task has its own splits. The rows of a table are assigned to validation by their hash (`data.val_fraction`), and
    "test" means validation. With `data.val_source` there is no split: every split has all rows. With `data.rejected`
    each example is followed by the same prompt with the rejected answer.
    Raises `DataError` for rows that cannot be used, with file and line, the first few together.
    """
    if source.startswith("task:"):
        task = find_task(source.removeprefix("task:"))
        rows = itertools.islice(_task_rows(task, split), data.max_documents)
        from_task = _labelled if data.answers == "classes" else _example
        make = functools.partial(from_task, task=task)
        for group in _usable(rows, lambda row, where: _with_rejected(make(row, where), data.rejected)):
            yield from group
        return
    assert data.prompt is not None and data.answer is not None  # see checks.py
    prompt, answer, labels = data.prompt, data.answer, data.labels
    from_row = _label_from_templates if data.answers == "classes" else _from_templates
    make = functools.partial(from_row, prompt=prompt, answer=answer, labels=labels)
    fraction = data.val_fraction if data.val_source is None else 0.0
    rows = itertools.islice(_table_rows(source, data), data.max_documents)
    for group in _usable(rows, lambda row, where: _with_rejected(make(row, where), data.rejected)):
        if group and (not fraction or _held_out(group[0], fraction) == (split != "train")):
            yield from group


def _held_out(example: Example, fraction: float) -> bool:
    return corpus.hash_fraction("\0".join(part.text for part in example.parts)) < fraction


def class_labels(data: DataConfig) -> tuple[str, ...]:
    """The class labels of a classifier: `data.labels`, or those of the tasks; () if answers are text.

    Raises `DataError` for a task without labels, or for tasks with different ones.
    """
    if data.answers == "text":
        return ()
    sources = [s for s in (data.source, data.val_source) if s is not None]
    names = [name for source in sources for name in ([source] if isinstance(source, str) else source)]
    labels = data.labels
    for task in (find_task(name.removeprefix("task:")) for name in names if name.startswith("task:")):
        if not task.classes:
            raise DataError(
                f"task:{task.name}: has no class labels, so data.answers = 'classes' cannot be used; "
                "set data.answers = 'text'"
            )
        if labels and labels != task.classes:
            raise DataError(
                f"task:{task.name}: its labels are {', '.join(task.classes)}, not {', '.join(labels)}; a classifier "
                "has one set of labels: leave data.labels out, and use sources with the same labels"
            )
        labels = task.classes
    return labels


def token_classes(example: Example, part_ids: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """The class at each token of an example, whose parts have the ids `part_ids`; -1: none. int16 [tokens].

    The class of a part is at its last token, which attends to all of it. Raises `DataError` for a labelled part without
    tokens.
    """
    classes = [np.full(len(ids), -1, np.int16) for ids in part_ids]
    for part, own in zip(example.parts, classes, strict=True):
        if part.label is None:
            continue
        if not len(own):
            raise DataError(
                f"{example.where}: {part.text!r} has no token in this tokenizer, so the label {part.label!r} has no "
                "position; remove the row, or use a tokenizer that has its characters"
            )
        own[-1] = labels.index(part.label)
    return np.concatenate(classes)


def fingerprint(source: str, data: DataConfig) -> str:
    """A hash of every byte of the rows, the templates and the labels."""
    if not source.startswith("task:"):
        content = (corpus.fingerprint(source, data), data.prompt, data.answer, data.rejected, data.labels)
        return hashlib.sha256(repr(content).encode()).hexdigest()
    digest = hashlib.sha256()
    for split in SPLITS:
        for example in load_examples(source, data, split):  # rejected answers included
            parts = [tuple(part[: 2 + (part.label is not None)]) for part in example.parts]
            row = (split, parts, example.references)
            digest.update(repr(row).encode(errors="surrogatepass"))
    return digest.hexdigest()


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template filled with a row's values. A name in braces is a column name, never an expression."""
    parts = Formatter().parse(template)
    return "".join(text + (values[name] if name is not None else "") for text, name, *_ in parts)


def _with_rejected(example: Example, rejected: str | None) -> tuple[Example, ...]:
    """The example, and with a template for it the same prompt with the rejected answer; () if both are equal."""
    if rejected is None:
        return (example,)
    where = example.where
    if missing := [name for name in columns(rejected) if name not in example.values]:
        raise DataError(
            f"{where}: has no column {', '.join(map(repr, missing))} (data.rejected); "
            f"it has {', '.join(example.values)}"
        )
    worse_answer = fill(rejected, example.values)
    if not worse_answer.strip():
        raise DataError(f"{where}: the rejected answer is empty ({', '.join(columns(rejected))}); remove the row")
    if worse_answer.strip() == example.answer.strip():
        _warn_of_equal_answers()
        return ()
    return example, dataclasses.replace(example, parts=(*example.parts[:-1], TextPart(worse_answer, True)))


def _usable(
    rows: Iterable[tuple[Any, str]], make: Callable[[Any, str], tuple[Example, ...]]
) -> Iterator[tuple[Example, ...]]:
    """The examples of the rows. After a row that cannot be used, only more such rows are collected, for the message."""
    problems: list[str] = []
    for row, where in rows:
        try:
            examples = make(row, where)
        except DataError as e:
            problems.append(str(e))
            if len(problems) == MAX_REPORTED:
                break
        else:
            if not problems:
                yield examples
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        first = f"the first {MAX_REPORTED}" if len(problems) == MAX_REPORTED else "all"
        raise DataError(f"rows that cannot be used ({first}):\n" + "\n".join(f"  - {p}" for p in problems))


def _table_rows(source: str, data: DataConfig) -> Iterator[tuple[dict[str, Any], str]]:
    assert data.prompt is not None and data.answer is not None
    names = columns(data.prompt) + columns(data.answer) + columns(data.rejected or "")
    for row, where in corpus.iter_rows(source, data):
        if missing := [name for name in names if name not in row]:  # the same for every row: not collected
            fields = "data.prompt, data.answer" + (", data.rejected" if data.rejected else "")
            raise DataError(
                f"{where}: has no column {', '.join(map(repr, missing))} ({fields}); it has {', '.join(row)}"
            )
        yield {name: row[name] for name in names}, where


def _from_templates(
    row: Mapping[str, Any], where: str, prompt: str, answer: str, labels: tuple[str, ...] = ()
) -> Example:
    values = {name: _text(value, f"{where}, column {name!r}") for name, value in row.items()}
    for name in columns(answer):
        if not values[name].strip():
            raise DataError(f"{where}: column {name!r} is empty, so there is no answer to train on; remove the row")
    if not any(values[name].strip() for name in columns(prompt)):
        raise DataError(f"{where}: the prompt is empty ({', '.join(columns(prompt))}); remove the row")
    parts = (TextPart(fill(prompt, values), False), TextPart(fill(answer, values), True))
    if labels and (given := parts[1].text.strip()) not in labels:
        near = difflib.get_close_matches(given, labels, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"the labels are {', '.join(labels)}"
        raise DataError(f"{where}: the answer {given!r} is none of the labels; {hint}")
    return Example(parts, where, values=values)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str | int | float) or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{where}: holds {value!r}; text or a number is needed")
    return str(value)


def _example(row: dict[str, str], where: str, task: Task) -> Example:
    if task.parts is not None:
        return Example(task.parts(row), where, values=row)
    example = _from_templates(row, where, task.prompt, task.answer, task.labels)
    references = tuple(row[task.references].split("\n")) if task.references else ()
    return Example(example.parts, where, references, row)


def _label_from_templates(
    row: Mapping[str, Any], where: str, prompt: str, answer: str, labels: tuple[str, ...]
) -> Example:
    """The answer becomes the class label of the prompt."""
    example = _from_templates(row, where, prompt, answer, labels)
    shown, target = example.parts
    return dataclasses.replace(example, parts=(TextPart(shown.text, False, target.text.strip()),))


def _labelled(row: dict[str, str], where: str, task: Task) -> Example:
    if task.tagging is None:
        return _label_from_templates(row, where, task.prompt, task.answer, task.labels)
    parts = task.tagging.parts(row)
    for part in parts:
        if part.label is not None and part.label not in task.classes:
            raise DataError(f"{where}: the label {part.label!r} of {part.text!r} is none of {', '.join(task.classes)}")
    return Example(parts, where, values=row)


def uses_samples() -> bool:
    """Whether tasks read the samples inside gptjax, because GPTJAX_DATA does not name the folder of the real data."""
    return not os.environ.get("GPTJAX_DATA")


def _task_rows(task: Task, split: Split) -> Rows:
    folder = SAMPLES if uses_samples() else Path(os.environ["GPTJAX_DATA"]).expanduser()
    where = "the start"
    try:
        for row, where in task.load_rows(split, folder):
            if uses_samples() and task.source:
                _warn_of_sample(task)
            yield row, where
    except FileNotFoundError as e:
        problem = f"{e.filename}: no such file; task:{task.name} reads it from $GPTJAX_DATA"
        if uses_samples():
            problem = f"task:{task.name}: has no sample in gptjax; set GPTJAX_DATA to the folder of its data"
        raise DataError(f"{problem}; get it from {task.source}") from None
    except (ValueError, KeyError, IndexError, TypeError) as e:
        raise DataError(
            f"task:{task.name}: cannot be read after {where} ({type(e).__name__}: {e}); get it again from {task.source}"
        ) from None


@functools.cache  # once a process
def _warn_of_equal_answers() -> None:
    warn("data.rejected: rows whose answer and rejected answer are equal are left out")


@functools.cache
def _warn_of_sample(task: Task) -> None:
    warn(
        f"task:{task.name}: GPTJAX_DATA is not set, so a tiny sample inside gptjax is read; its scores mean nothing. "
        f"For the real data ({task.source}) set GPTJAX_DATA to its folder"
    )
