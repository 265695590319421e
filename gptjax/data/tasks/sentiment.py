"""Sentiment: whether a sentence of a film review is for or against the film (Pang and Lee 2005)."""

from pathlib import Path

from gptjax.data.tasks import Rows, Split, Task, split_of

FILES = {"negative": "neg.txt", "positive": "pos.txt"}


def load_rows(split: Split, folder: Path) -> Rows:
    """Sentences and labels, alternating. A hash of the sentence decides the split, so none is in two splits."""
    paths = {label: folder / "sentence_polarity" / name for label, name in FILES.items()}
    texts = {label: path.read_text(encoding="utf-8").splitlines() for label, path in paths.items()}
    for number in range(max(map(len, texts.values()))):
        for label, lines in texts.items():
            if number < len(lines) and (sentence := lines[number].strip()) and split_of(sentence) == split:
                yield {"sentence": sentence, "label": label}, f"{paths[label]}, line {number + 1}"


TASK = Task(
    name="sentiment",
    summary="say whether a sentence about a film is positive or negative",
    load_rows=load_rows,
    prompt="{sentence}\nSentiment:\n",
    answer="{label}",
    labels=("negative", "positive"),
    metrics=("accuracy", "f1"),
    baseline="majority",
    max_new_tokens=10,
    source="https://github.com/nltk/nltk_data (corpora/sentence_polarity)",
    licence="CC BY 4.0",
)
