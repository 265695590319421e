"""Dialogue: a coffee bar's agent answers a customer (Taskmaster-4, Google)."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from gptjax.data.tasks import Part, Rows, Side, Task, side_of

USER, AGENT = "User:", "Assistant:"  # as inference/chat.py writes for models without a template


def read(side: Side, folder: Path) -> Rows:
    """Dialogues that end with the agent, one turn a line; a tenth each is kept by the dialogue's hash.

    For test, each turn of the agent is an example of its own, with all that was said before it.
    """
    path = folder / "taskmaster4" / "data_07.json"
    for number, dialogue in enumerate(json.loads(path.read_text(encoding="utf-8")), 1):
        turns = [(t["speaker"] == "assistant", " ".join(t["text"].split())) for t in dialogue["utterances"]]
        lines = [f"{AGENT if by_agent else USER} {text}" for by_agent, text in turns]
        if side_of("\n".join(lines)) != side:
            continue
        answered = [i + 1 for i, (by_agent, _) in enumerate(turns) if by_agent]
        for end in answered if side == "test" else answered[-1:]:
            yield {"dialogue": "\n".join(lines[:end])}, f"{path}, dialogue {number}, turn {end}"


def parts(row: Mapping[str, str]) -> tuple[Part, ...]:
    """The agent's turns are asked for, and with each but the last the mark of the customer's: where to stop."""
    pieces = re.split(rf"(?<=^{AGENT})|(?<=\n{AGENT})|(?<=\n{USER})", row["dialogue"])
    made: list[Part] = []
    asked = False
    for piece in pieces:
        made.append(Part(piece, asked))
        asked = piece.endswith(AGENT)
    return tuple(made)


TASK = Task(
    name="dialogue",
    summary="answer a customer of a coffee bar",
    read=read,
    prompt="{dialogue}",  # not used: `parts` says where the agent speaks
    answer="{dialogue}",
    parts=parts,
    metrics=("chrf", "rouge_l", "bleu"),
    baseline="majority",
    new_tokens=256,
    source="https://github.com/google-research-datasets/Taskmaster (TM-4-2024)",
    licence="CC BY 4.0",
)
