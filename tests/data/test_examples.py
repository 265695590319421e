"""Examples from a table: prompts, answers, splits, and rows that cannot be used, reported before training."""

import pytest

from gptjax.checks import check
from gptjax.config import DataConfig, Experiment
from gptjax.data.examples import fingerprint, load_examples
from gptjax.errors import ConfigError, DataError


def table(folder, *rows: str) -> DataConfig:
    (folder / "table.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    return DataConfig(
        source=str(folder / "table.csv"), prompt="Q: {text}\nA:", answer=" {label}", labels=("good", "bad"),
        val_fraction=0.2,
    )  # fmt: skip


def test_a_table_and_two_templates_make_examples(tmp_path):
    data = table(tmp_path, *(f"film {i} {{is}} fine,{'good' if i % 2 else 'bad'}" for i in range(200)))
    splits = {split: list(load_examples(data.source, data, split)) for split in ("train", "validation", "test")}
    assert splits["test"] == splits["validation"] and 20 < len(splits["test"]) < 65
    texts = {e.prompt for split in ("train", "validation") for e in splits[split]}
    assert len(splits["train"]) + len(splits["test"]) == len(texts) == 200, "no row in both splits"
    first = splits["train"][0]
    assert [p.is_target for p in first.parts] == [False, True] and first.answer in (" good", " bad")
    assert "{is}" in first.prompt, "braces in a row are text"
    before = fingerprint(data.source, data)
    assert before != fingerprint(data.source, table(tmp_path, "film 1 is fine,good"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("fine,godo", r"the answer 'godo' is none of the labels; did you mean 'good'\?"),
        ("fine,", r"column 'label' is empty, so there is no answer to train on"),
        (",good", r"the prompt is empty \(text\)"),
    ],
)
def test_rows_that_cannot_be_used_are_reported(tmp_path, row, message):
    data = table(tmp_path, "a,good", row, "b,bad")
    with pytest.raises(DataError, match=r"table.csv, line 3.*" + message):
        list(load_examples(data.source, data, "train"))


def test_all_bad_rows_are_reported_together_and_a_missing_column_once(tmp_path):
    data = table(tmp_path, "a,good", "fine,x", "fine,y")
    with pytest.raises(DataError, match=r"(?s)rows that cannot be used.*'x'.*'y'"):
        list(load_examples(data.source, data, "train"))
    (tmp_path / "table.csv").write_text("words,label\na,good\n")
    with pytest.raises(DataError, match=r"has no column 'text' \(data.prompt, data.answer\); it has words, label"):
        list(load_examples(data.source, data, "train"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "{a}"}, "an example needs both"),
        ({"labels": ("x",)}, r"data.labels = \('x',\): the data has no answers; set data.answer"),
        ({"prompt": "a", "answer": "{b}"}, r"data.prompt = 'a': names no column"),
        ({"prompt": "{a}", "answer": "{"}, r"data.answer = '\{': .*a column is written in braces, and \{\{ is a lit"),
        ({"source": ("task:sentiment", "pydoc")}, "mixes tasks with other text"),
        ({"prompt": "{}", "answer": "{b}"}, r"data.prompt = '\{\}': names no column, or an empty one"),
    ],
)
def test_unusable_templates_are_refused_with_the_config(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(Experiment(data=DataConfig(**changes)))
    check(Experiment(data=DataConfig(prompt="{{a}} {b}:", answer=" {c}", labels=("x",))))
