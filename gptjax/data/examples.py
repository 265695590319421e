"""What a model is shown and what it is asked for: examples from a task, or from any table with two templates.

A template is text with the names of columns in braces. Rows that cannot be used are refused before training, the
first few together, each with its file and line.
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

SAMPLES = Path(__file__).parent / "tasks" / "samples"  # laid out as the real data is
SHOWN = 5  # problems that are reported together
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def holds_examples(data: DataConfig) -> bool:
    """Whether there are prompts and answers in the source, not plain text."""
    sources = (data.source,) if isinstance(data.source, str) else data.source
    return data.prompt is not None or any(source.startswith("task:") for source in sources)


def load_examples(source: str, data: DataConfig, split: Split) -> Iterator[Example]:
    """The examples of one split of `task:NAME`, or of a table with `data.prompt` and `data.answer`, in a fixed order.

    A task has its own sides. Of a table, whole rows are kept for validation by their hash (`data.val_fraction`), and
    test is validation; with `data.val_source` nothing is split off, and both sides of a source are all of it. With
    `data.rejected` each is followed by the same prompt with the worse answer.
    Raises `DataError` for rows that cannot be used, naming file and line, the first few together.
    """
    if source.startswith("task:"):
        task = find_task(source.removeprefix("task:"))
        rows = itertools.islice(_task_rows(task, split), data.max_documents)
        make = functools.partial(_labelled if data.answers == "classes" else _example, task=task)
        for group in _sound(rows, lambda row, where: _with_worse(make(row, where), data.rejected)):
            yield from group
        return
    assert data.prompt is not None and data.answer is not None  # see checks.py
    prompt, answer, labels = data.prompt, data.answer, data.labels
    from_row = _label_from_templates if data.answers == "classes" else _from_templates
    make = functools.partial(from_row, prompt=prompt, answer=answer, labels=labels)
    fraction = data.val_fraction if data.val_source is None else 0.0
    rows = itertools.islice(_table_rows(source, data), data.max_documents)
    for group in _sound(rows, lambda row, where: _with_worse(make(row, where), data.rejected)):
        if group and (not fraction or _held_out(group[0], fraction) == (split != "train")):
            yield from group


def _held_out(example: Example, fraction: float) -> bool:
    return corpus.hash_fraction("\0".join(part.text for part in example.parts)) < fraction


def class_labels(data: DataConfig) -> tuple[str, ...]:
    """The labels that a model tells: `data.labels`, or those of the tasks; () where answers are text.

    Raises `DataError` for a task whose answers are no labels, or are not the same ones.
    """
    if data.answers == "text":
        return ()
    sources = [s for s in (data.source, data.val_source) if s is not None]
    names = [name for source in sources for name in ([source] if isinstance(source, str) else source)]
    labels = data.labels
    for task in (find_task(name.removeprefix("task:")) for name in names if name.startswith("task:")):
        if not task.classes:
            raise DataError(
                f"task:{task.name}: its answers are text without labels, so that data.answers = 'classes' has nothing "
                "to tell; set data.answers = 'text'"
            )
        if labels and labels != task.classes:
            raise DataError(
                f"task:{task.name}: its labels are {', '.join(task.classes)}, not {', '.join(labels)}; a model tells "
                "one set of labels: leave data.labels out, and take sources that have the same ones"
            )
        labels = task.classes
    return labels


def token_classes(example: Example, pieces: Sequence[np.ndarray], classes: Sequence[str]) -> np.ndarray:
    """The number of the class that is told at each token of an example cut into `pieces`, one a part; -1: none.

    int16 [tokens]. A label is told at the last token of its part, which has seen all of it. Raises `DataError` for a
    part without tokens.
    """
    told = [np.full(len(ids), -1, np.int16) for ids in pieces]
    for part, own in zip(example.parts, told, strict=True):
        if part.label is None:
            continue
        if not len(own):
            raise DataError(
                f"{example.where}: {part.text!r} has no token in this tokenizer at which {part.label!r} could be told; "
                "remove the row, or take a tokenizer that knows its characters"
            )
        own[-1] = classes.index(part.label)
    return np.concatenate(told)


def fingerprint(source: str, data: DataConfig) -> str:
    """A hash that changes with any byte of the rows, the templates or the labels."""
    if not source.startswith("task:"):
        whole = (corpus.fingerprint(source, data), data.prompt, data.answer, data.rejected, data.labels)
        return hashlib.sha256(repr(whole).encode()).hexdigest()
    digest = hashlib.sha256()
    for split in SPLITS:
        for example in load_examples(source, data, split):  # with the worse answers among them
            parts = [tuple(part[: 2 + (part.label is not None)]) for part in example.parts]
            row = (split, parts, example.references)
            digest.update(repr(row).encode(errors="surrogatepass"))
    return digest.hexdigest()


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with a row's values in it. A name in braces is the column of that name and nothing else."""
    pieces = Formatter().parse(template)
    return "".join(text + (values[name] if name is not None else "") for text, name, *_ in pieces)


def _with_worse(example: Example, rejected: str | None) -> tuple[Example, ...]:
    """The example, and where there is a template for it, the same prompt with the worse answer; () if both are one."""
    if rejected is None:
        return (example,)
    where = example.where
    if missing := [name for name in columns(rejected) if name not in example.values]:
        raise DataError(
            f"{where}: has no column {', '.join(map(repr, missing))} (data.rejected); "
            f"it has {', '.join(example.values)}"
        )
    worse = fill(rejected, example.values)
    if not worse.strip():
        raise DataError(f"{where}: the answer to reject is empty ({', '.join(columns(rejected))}); remove the row")
    if worse.strip() == example.answer.strip():
        _tell_of_pairs()
        return ()
    return example, dataclasses.replace(example, parts=(*example.parts[:-1], TextPart(worse, True)))


def _sound(
    rows: Iterable[tuple[Any, str]], make: Callable[[Any, str], tuple[Example, ...]]
) -> Iterator[tuple[Example, ...]]:
    """What is made of the rows, until one cannot be used: then only more of these are looked for."""
    problems: list[str] = []
    for row, where in rows:
        try:
            made = make(row, where)
        except DataError as e:
            problems.append(str(e))
            if len(problems) == SHOWN:
                break
        else:
            if not problems:
                yield made
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        first = f"the first {SHOWN}" if len(problems) == SHOWN else "all"
        raise DataError(f"rows that cannot be used ({first}):\n" + "\n".join(f"  - {p}" for p in problems))


def _table_rows(source: str, data: DataConfig) -> Iterator[tuple[dict[str, Any], str]]:
    assert data.prompt is not None and data.answer is not None
    names = columns(data.prompt) + columns(data.answer) + columns(data.rejected or "")
    for row, where in corpus.iter_rows(source, data):
        if missing := [name for name in names if name not in row]:  # of every row of the table: said once
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
            raise DataError(f"{where}: column {name!r} is empty, and there is no answer to learn; remove the row")
    if not any(values[name].strip() for name in columns(prompt)):
        raise DataError(f"{where}: the prompt is empty ({', '.join(columns(prompt))}); remove the row")
    parts = (TextPart(fill(prompt, values), False), TextPart(fill(answer, values), True))
    if labels and (given := parts[1].text.strip()) not in labels:
        near = difflib.get_close_matches(given, labels, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(labels)}"
        raise DataError(f"{where}: the answer {given!r} is none of the labels; {hint}")
    return Example(parts, where, values=values)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str | int | float) or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{where}: holds {value!r}; text or a number is needed")
    return str(value)


def _example(row: dict[str, str], where: str, task: Task) -> Example:
    if task.parts is not None:
        return Example(task.parts(row), where, values=row)
    made = _from_templates(row, where, task.prompt, task.answer, task.labels)
    references = tuple(row[task.references].split("\n")) if task.references else ()
    return Example(made.parts, where, references, row)


def _label_from_templates(
    row: Mapping[str, Any], where: str, prompt: str, answer: str, labels: tuple[str, ...]
) -> Example:
    """The answer as a label, to be told at the end of the prompt."""
    made = _from_templates(row, where, prompt, answer, labels)
    read, told = made.parts
    return dataclasses.replace(made, parts=(TextPart(read.text, False, told.text.strip()),))


def _labelled(row: dict[str, str], where: str, task: Task) -> Example:
    if task.tagging is None:
        return _label_from_templates(row, where, task.prompt, task.answer, task.labels)
    parts = task.tagging.parts(row)
    for part in parts:
        if part.label is not None and part.label not in task.classes:
            raise DataError(f"{where}: the label {part.label!r} of {part.text!r} is none of {', '.join(task.classes)}")
    return Example(parts, where, values=row)


def uses_samples() -> bool:
    """Whether tasks read the samples inside gptjax, as no GPTJAX_DATA names a folder with the real data."""
    return not os.environ.get("GPTJAX_DATA")


def _task_rows(task: Task, split: Split) -> Rows:
    folder = SAMPLES if uses_samples() else Path(os.environ["GPTJAX_DATA"]).expanduser()
    where = "its beginning"
    try:
        for row, where in task.load_rows(split, folder):
            if uses_samples() and task.source:
                _tell_of_sample(task)
            yield row, where
    except FileNotFoundError as e:
        problem = f"{e.filename}: no such file, and task:{task.name} reads it from $GPTJAX_DATA"
        if uses_samples():
            problem = f"task:{task.name}: has no sample in gptjax; set GPTJAX_DATA to the folder that holds its data"
        raise DataError(f"{problem}; get it from {task.source}") from None
    except (ValueError, KeyError, IndexError, TypeError) as e:
        raise DataError(
            f"task:{task.name}: cannot be read after {where} ({type(e).__name__}: {e}); get it again from {task.source}"
        ) from None


@functools.cache  # once a process
def _tell_of_pairs() -> None:
    warn("data.rejected: rows whose two answers are one teach nothing, and are left out")


@functools.cache
def _tell_of_sample(task: Task) -> None:
    warn(
        f"task:{task.name}: GPTJAX_DATA is not set, so a tiny sample inside gptjax is read; its figures mean nothing. "
        f"For the real data ({task.source}) set GPTJAX_DATA to its folder"
    )
