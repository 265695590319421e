"""Addition: the sum of two numbers below 100, whose truth can be verified. Made here, without data."""

import random
from pathlib import Path

from gptjax.data.tasks import Rows, Split, Task, split_of

BELOW = 100


def load_rows(split: Split, folder: Path) -> Rows:
    """All pairs of numbers, with their sum and a number near it; a tenth each is kept by the hash of the pair."""
    for a in range(BELOW):
        for b in range(BELOW):
            if split_of(f"{a}+{b}") == split:
                wrong = abs(a + b + random.Random(f"{a}+{b}").choice((-10, -1, 1, 10)))
                yield {"a": str(a), "b": str(b), "sum": str(a + b), "wrong": str(wrong)}, f"{a}+{b}"


TASK = Task(
    name="addition",
    summary="add two numbers",
    load_rows=load_rows,
    prompt="{a}+{b}=",
    answer="{sum}",
    metrics=("exact_match", "edit_distance"),
    baseline="majority",
    max_new_tokens=6,
    source=None,
    licence="made here",
)
