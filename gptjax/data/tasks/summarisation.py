"""Summarisation: a scientific abstract becomes one sentence (SciTLDR, Cachola et al. 2020)."""

import json
from pathlib import Path

from gptjax.data.tasks import Rows, Split, Task

FILES: dict[Split, str] = {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}


def load_rows(split: Split, folder: Path) -> Rows:
    """Abstracts with all their summaries; the first one is the target. The splits are those of the data set."""
    path = folder / "scitldr" / FILES[split]
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            summaries = [" ".join(target.split()) for target in row["target"]]
            columns = {
                "abstract": " ".join(" ".join(row["source"]).split()),
                "summary": summaries[0],
                "summaries": "\n".join(summaries),
            }
            yield columns, f"{path}, line {number}"


TASK = Task(
    name="summarisation",
    summary="summarise a scientific abstract in one sentence",
    load_rows=load_rows,
    prompt="{abstract}\n\nSummary:\n",
    answer="{summary}",
    references="summaries",
    metrics=("rouge_l", "rouge_1", "rouge_2"),
    baseline="lead",
    max_new_tokens=256,
    source="https://github.com/allenai/scitldr",
    licence="Apache-2.0",
)
