"""Correction: text with typing errors becomes the text without them."""

import hashlib
import random
from pathlib import Path

from gptjax.data.tasks import Rows, Split, Task, split_of

RATES = {"drop": 0.02, "double": 0.01, "swap": 0.02, "neighbour": 0.02}  # per character, that this befalls it
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
SHORTEST = 20  # characters; a shorter line has too little in it to tell what was meant


def load_rows(split: Split, folder: Path) -> Rows:
    """Different lines of a text, each with a copy full of errors; a tenth each is kept by the line's hash."""
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

    At most one error befalls a character. The text and the seed alone decide which.
    """
    dice = random.Random(hashlib.sha256(f"{seed} {text}".encode()).digest())
    errors, weights = [*rates, None], [*rates.values(), 1 - sum(rates.values())]
    made = []
    i = 0
    while i < len(text):
        here, after = text[i], text[i + 1 : i + 2]
        error = dice.choices(errors, weights)[0]
        i += 1
        if error == "swap":
            made.append(after + here)
            i += 1
        elif error == "neighbour":
            made.append(_neighbour(here, dice))
        elif error != "drop":
            made.append(here * 2 if error == "double" else here)
    return "".join(made)


def _neighbour(letter: str, dice: random.Random) -> str:
    """A key beside that of the letter in its row, in the same case; anything but a letter stays."""
    row = next((row for row in KEYBOARD if letter.lower() in row), None)
    if row is None:
        return letter
    place = row.index(letter.lower())
    hit = dice.choice(row[max(place - 1, 0) : place] + row[place + 1 : place + 2])
    return hit.upper() if letter.isupper() else hit


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
