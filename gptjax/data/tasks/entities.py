"""Named entities: the people, places and things that a message names (WNUT17, Derczynski et al. 2017)."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gptjax.data.tasks import Rows, Split, Tagging, Task, TextPart

FILES: dict[Split, str] = {
    "train": "wnut17train.conll",
    "validation": "emerging.dev.conll",
    "test": "emerging.test.annotated",
}
TYPES = ("corporation", "creative-work", "group", "location", "person", "product")
TAGS = ("O", *(f"{prefix}-{kind}" for kind in TYPES for prefix in "BI"))
NONE = "none"
MENTION = re.compile(rf"(?:^|; )({'|'.join(TYPES)}): (.*?)(?=; (?:{'|'.join(TYPES)}): |$)")


def load_rows(split: Split, folder: Path) -> Rows:
    """Messages with their entities; `tokens` and `tags` (BIO) are joined by spaces. The data set's own splits."""
    path = folder / "wnut17" / FILES[split]
    with path.open(encoding="utf-8") as stream:
        lines = ((number, line.strip().split("\t")) for number, line in enumerate(stream, 1))
        for blank, group in itertools.groupby(lines, key=lambda line: line[1] == [""]):
            if blank:
                continue
            numbers, pairs = zip(*group, strict=True)
            tokens, tags = zip(*pairs, strict=True)
            columns = {"tokens": " ".join(tokens), "tags": " ".join(tags), "entities": answer_of(tokens, tags)}
            yield columns, f"{path}, line {numbers[0]}"


def words(row: Mapping[str, str]) -> tuple[TextPart, ...]:
    """The words of a message, each with the space before it and with its tag."""
    pairs = enumerate(zip(row["tokens"].split(" "), row["tags"].split(" "), strict=True))
    return tuple(TextPart(f" {token}" if number else token, False, tag) for number, (token, tag) in pairs)


def answer_of(tokens: Sequence[str], tags: Sequence[str]) -> str:
    """The entities as text in the order of their first words: "person: Jane Doe; location: Paris", or "none"."""
    mentions: list[tuple[str, list[str]]] = []
    previous = "O"
    for token, tag in zip(tokens, tags, strict=True):
        prefix, _, kind = tag.partition("-")
        if prefix == "B" or (prefix == "I" and previous.partition("-")[2] != kind):
            mentions.append((kind, [token]))
        elif prefix == "I":
            mentions[-1][1].append(token)
        previous = tag
    return "; ".join(f"{kind}: {' '.join(words)}" for kind, words in mentions) or NONE


def tags_of(answer: str, tokens: list[str]) -> list[str]:
    """The BIO tags of tokens, one for each, from an answer in the form of `answer_of`; unknown mentions are ignored.

    Each mention is searched for after the previous one, then from the start; mentions never overlap.
    """
    tags = ["O"] * len(tokens)
    after = 0
    for kind, mention in MENTION.findall(answer.strip()):
        words = mention.split()
        for start in [*_matches(words, tokens, after), *_matches(words, tokens, 0)]:
            end = start + len(words)
            if tags[start:end] == ["O"] * len(words):
                tags[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (len(words) - 1)
                after = end
                break
    return tags


def _matches(words: list[str], tokens: list[str], first: int) -> Iterator[int]:
    last = len(tokens) - len(words) if words else -1
    return (start for start in range(first, last + 1) if tokens[start : start + len(words)] == words)


TASK = Task(
    name="entities",
    summary="list the people, places, groups, companies, products and works that a message names",
    load_rows=load_rows,
    prompt="{tokens}\nEntities:\n",
    answer="{entities}",
    metrics=("f1", "exact_match"),
    baseline="majority",
    max_new_tokens=160,
    tagging=Tagging(TAGS, words, lambda row, tags: answer_of(row["tokens"].split(" "), tags)),
    source="https://github.com/leondz/emerging_entities_17",
    licence="CC BY 4.0",
)
