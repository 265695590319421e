"""Correction: text with typing errors becomes the text without them."""

import hashlib
import random
from pathlib import Path

from gptjax.data.tasks import Rows, Split, Task, split_of

RATES = {"drop": 0.02, "double": 0.01, "swap": 0.02, "neighbour": 0.02}  # probability per character
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
SHORTEST = 20  # characters; a shorter line has too little context


def load_rows(split: Split, folder: Path) -> Rows:
    """The distinct lines of a text, each with a corrupted copy. A hash of the line decides the split."""
    path = folder / "tinyshakespeare.txt"
    seen = set()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if len(text) >= SHORTEST and text not in seen and split_of(text) == split:
                seen.add(text)
                yield {"wrong": corrupt(text), "right": text}, f"{path}, line {number}"


def corrupt(text: str, rates: dict[str, float] = RATES, seed: int = 0) -> str:
    """A copy with typing errors: characters dropped, doubled, swapped with the next, or hit on a neighbouring key.

    A character has at most one error. The errors depend on the text and the seed only.
    """
    rng = random.Random(hashlib.sha256(f"{seed} {text}".encode()).digest())
    errors, weights = [*rates, None], [*rates.values(), 1 - sum(rates.values())]
    out = []
    i = 0
    while i < len(text):
        here, after = text[i], text[i + 1 : i + 2]
        error = rng.choices(errors, weights)[0]
        i += 1
        if error == "swap":
            out.append(after + here)
            i += 1
        elif error == "neighbour":
            out.append(_neighbour(here, rng))
        elif error != "drop":
            out.append(here * 2 if error == "double" else here)
    return "".join(out)


def _neighbour(letter: str, rng: random.Random) -> str:
    """A key next to the letter's in its row, in the same case; any other character is unchanged."""
    row = next((row for row in KEYBOARD if letter.lower() in row), None)
    if row is None:
        return letter
    i = row.index(letter.lower())
    key = rng.choice(row[max(i - 1, 0) : i] + row[i + 1 : i + 2])
    return key.upper() if letter.isupper() else key


TASK = Task(
    name="correction",
    summary="correct the typing errors in a line",
    load_rows=load_rows,
    prompt="{wrong}\nCorrect:\n",
    answer="{right}",
    metrics=("edit_distance", "exact_match"),
    baseline="copy",
    max_new_tokens=80,
    source="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    licence="public domain",
)
