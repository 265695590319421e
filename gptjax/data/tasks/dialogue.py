"""Dialogue: a coffee bar's agent answers a customer (Taskmaster-4, Google)."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from gptjax.data.tasks import Rows, Split, Task, TextPart, split_of

USER, AGENT = "User:", "Assistant:"  # as in inference/chat.py, for models without a chat template


def load_rows(split: Split, folder: Path) -> Rows:
    """Dialogues that end with the agent, one turn on each line. A hash of the dialogue decides the split.

    For "test", each turn of the agent is a separate example, with all turns before it.
    """
    path = folder / "taskmaster4" / "data_07.json"
    for number, dialogue in enumerate(json.loads(path.read_text(encoding="utf-8")), 1):
        turns = [(t["speaker"] == "assistant", " ".join(t["text"].split())) for t in dialogue["utterances"]]
        lines = [f"{AGENT if by_agent else USER} {text}" for by_agent, text in turns]
        if split_of("\n".join(lines)) != split:
            continue
        answered = [i + 1 for i, (by_agent, _) in enumerate(turns) if by_agent]
        for end in answered if split == "test" else answered[-1:]:
            yield {"dialogue": "\n".join(lines[:end])}, f"{path}, dialogue {number}, turn {end}"


def parts(row: Mapping[str, str]) -> tuple[TextPart, ...]:
    """The targets are the agent's turns, each with the next "User:", which ends an answer, except the last."""
    lines = re.split(rf"(?<=^{AGENT})|(?<=\n{AGENT})|(?<=\n{USER})", row["dialogue"])
    found: list[TextPart] = []
    is_target = False
    for line in lines:
        found.append(TextPart(line, is_target))
        is_target = line.endswith(AGENT)
    return tuple(found)


TASK = Task(
    name="dialogue",
    summary="answer a customer of a coffee bar",
    load_rows=load_rows,
    prompt="{dialogue}",  # not used: `parts` finds the turns of the agent
    answer="{dialogue}",
    parts=parts,
    metrics=("chrf", "rouge_l", "bleu"),
    baseline="majority",
    max_new_tokens=256,
    source="https://github.com/google-research-datasets/Taskmaster (TM-4-2024)",
    licence="CC BY 4.0",
)
