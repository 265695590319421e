"""Text generation: a passage is continued."""

import re
from pathlib import Path

from gptjax.data.tasks import Rows, Split, Task

LENGTH = 300  # characters, after which a passage ends with its line; about half of it is the prompt


def load_rows(split: Split, folder: Path) -> Rows:
    """Passages of complete lines, divided between two lines. The last two tenths of the text are held out.

    They are not drawn from all of the text, because neighbouring passages in training would give them away.
    """
    path = folder / "tinyshakespeare.txt"
    text = path.read_text(encoding="utf-8")
    passages = list(re.finditer(rf"\S.{{{LENGTH}}}.*?(?=\n|\Z)", text, re.DOTALL))
    first, last = len(passages) * 8 // 10, len(passages) * 9 // 10
    chosen = {"train": passages[:first], "validation": passages[first:last], "test": passages[last:]}[split]
    for passage in chosen:
        half = passage[0].find("\n", LENGTH // 2) + 1
        if passage[0][half:].strip():
            line = text.count("\n", 0, passage.start()) + 1
            yield {"beginning": passage[0][:half], "rest": passage[0][half:]}, f"{path}, line {line}"


TASK = Task(
    name="generation",
    summary="continue a passage of a play",
    load_rows=load_rows,
    prompt="{beginning}",
    answer="{rest}",
    metrics=("chrf", "rouge_l"),
    baseline="copy",
    max_new_tokens=256,
    source="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    licence="public domain",
)
