"""Class labels instead of answers: each is a target at the last token of its text, once an epoch. Labels that are lost
or wrong are reported before training."""

import collections
import json
from itertools import pairwise

import numpy as np
import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.data import tasks
from gptjax.data.batches import DataLoader, positions_within
from gptjax.data.examples import class_labels, load_examples, token_classes
from gptjax.data.store import Stream, open_store
from gptjax.data.tasks import TASKS, Example, Tagging, Task, TextPart
from gptjax.data.tasks.entities import TAGS, answer_of, tags_of
from gptjax.data.windows import PackedStream, Windows
from gptjax.errors import DataError
from gptjax.objectives import make_objective
from gptjax.objectives.sft import answer_batch

LABELS = ("low", "high", "odd one")


def table(folder, rows, **changes) -> DataConfig:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": x, "label": y}) + "\n" for x, y in rows))
    given = dict(prompt="{text}?", answer=" {label}", answers="classes", labels=LABELS, val_fraction=0.2)
    return DataConfig(source=str(folder / "rows.jsonl"), **(given | changes))


@pytest.fixture
def register(monkeypatch, tmp_path):
    """Makes a task of rows, the same in every split: words of a text, each with a tag."""

    def make(rows, labels=("O", "X"), name="ours") -> Task:
        def parts(row):
            pairs = zip(row["x"].split("|"), row["y"].split("|"), strict=True)
            return tuple(TextPart(word, False, tag) for word, tag in pairs)

        task = Task(
            name=name, summary="", load_rows=lambda split, path: ((r, f"rows.txt:{i}") for i, r in enumerate(rows, 1)),
            prompt="{x}", answer="{y}", metrics=("f1",), baseline="majority", source="", licence="",
            tagging=Tagging(labels, parts, lambda row, tags: "|".join(tags)),
        )  # fmt: skip
        monkeypatch.setitem(tasks.TASKS, name, task)
        return task

    monkeypatch.setenv("GPTJAX_DATA", str(tmp_path))
    return make


def targets_of(batches: DataLoader, steps) -> collections.Counter:
    """Counts (text up to a target, its label) over all windows of some steps."""
    found = collections.Counter()
    labels = batches.experiment.data.labels
    for step in steps:
        batch = batches.host_batch(step)
        for row in zip(*(x.reshape(-1, x.shape[-1]) for x in batch[:5]), strict=True):
            tokens, targets, weights, segments, _ = row
            for position in np.flatnonzero(weights):
                own = (segments == segments[position]) & (np.arange(len(tokens)) <= position)
                found[bytes(tokens[own].tolist()).decode(), labels[targets[position]]] += 1
    return found


def test_a_label_is_a_target_at_the_end_of_its_prompt_once_an_epoch(tmp_path):
    """Also if a text fills the context to the last token."""
    rows = [("x" * (i % 16) + chr(97 + i % 26), LABELS[i % 3]) for i in range(200)]
    e = TINY.override(model=dict(context_length=17), train=dict(batch_size=1, sample_tokens=0))
    data = table(tmp_path, rows)
    e = e.override({f"data.{name}": getattr(data, name) for name in DataConfig.__dataclass_fields__})
    e = e.override({"objective.name": "sft"}).resolved(257, class_labels(data))
    batches = DataLoader(open_store(e.data), e, make_objective(e))
    stream = batches.train_streams[0]
    parts = [example.parts[0] for example in load_examples(data.source, data, "train")]
    expected = collections.Counter((part.text, part.label) for part in parts)
    assert max(len(text) for text, _ in expected) == 17, "as long as the context"
    assert targets_of(batches, range(stream.windows_per_epoch)) == expected
    assert targets_of(batches, range(2 * stream.windows_per_epoch)) == expected + expected
    val = sum(batch.loss_weights.sum() for batch in batches.validation())
    assert 20 < val == len(list(load_examples(data.source, data, "validation"))) == stream_labels(batches)


def stream_labels(batches):
    return sum((stream.stream.classes >= 0).sum() for stream in batches.validation_streams)


def test_every_word_has_its_tag_at_its_last_token(register):
    rows = [{"x": "ab| cde| f", "y": "O|X|O"}, {"x": "é|!", "y": "X|X"}, {"x": "g", "y": "O"}]
    register(rows)
    data = DataConfig(source="task:ours", answers="classes")
    (stream,) = open_store(data).train
    assert bytes(stream.ids.tolist()).decode() == "ab cde fé!g"
    #                                   a   b      c   d  e      f   é     !  g
    assert stream.classes.tolist() == [-1, 0, -1, -1, -1, 1, -1, 0, -1, 1, 1, 0]
    assert not stream.loss_mask.any(), "no token of the text is a target"


lengths = st.lists(st.integers(1, 12), min_size=1, max_size=30)


@given(lengths, st.integers(0, 99), st.data())
@settings(max_examples=50, deadline=None)
def test_packed_windows_have_every_class_at_its_own_token(sizes, seed, data):
    starts = np.cumsum([0, *sizes])
    classes = np.array(data.draw(st.lists(st.integers(-1, 4), min_size=sum(sizes), max_size=sum(sizes))), np.int16)
    ids = np.arange(starts[-1], dtype=np.uint32)  # every token is its own position
    stream = PackedStream(Stream("x", ids, starts[:-1], np.zeros(len(ids), bool), None, classes), 12, (seed,))
    assert stream.num_targets == (classes >= 0).sum()
    batch = answer_batch(stream.shuffled(np.arange(stream.windows_per_epoch)))
    is_target = batch.loss_weights > 0
    found = dict(zip(batch.tokens[is_target].tolist(), batch.targets[is_target].tolist(), strict=True))
    assert found == {i: c for i, c in enumerate(classes) if c >= 0} and len(found) == is_target.sum()
    valid = batch.segment_ids > 0
    assert sorted(batch.tokens[valid]) == ids.tolist(), "every token is an input once, the last of a full window too"
    owner = np.repeat(np.arange(len(sizes)), sizes)
    for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
        for i, j in pairwise(np.flatnonzero(segments)):
            assert (segments[i] == segments[j]) == (owner[tokens[i]] == owner[tokens[j]])
    np.testing.assert_array_equal(batch.positions, positions_within(batch.segment_ids))


def test_padding_has_no_class():
    ids = np.array([[5, 6, 0, 0]], np.int32)
    windows = Windows(ids, ids > 0, (ids > 0).astype(np.int32), ids < 0, np.array([[-1, 3, -1, -1]], np.int16))
    batch = answer_batch(windows)
    assert batch.targets.tolist() == [[0, 3, 0]] and batch.loss_weights.tolist() == [[0, 1, 0]]
    assert batch.targets.dtype == np.int32 and batch.segment_ids.tolist() == [[1, 1, 0]]


def test_a_long_text_loses_its_beginning_but_no_label(tmp_path):
    def stream(classes):
        (tmp_path / "origins").write_text("rows.txt:1\nrows.txt:2")
        ids = np.arange(30, dtype=np.uint32)
        return PackedStream(Stream("x", ids, np.array([0, 20]), ids < 0, tmp_path / "origins", classes), 16, (0,))

    classes = np.full(30, -1, np.int16)
    classes[[4, 19, 29]] = 1  # the first 4 of 20 tokens are cut off
    batch = answer_batch(stream(classes).in_order(np.arange(2)))
    assert sorted(batch.tokens[batch.loss_weights > 0]) == [4, 19, 29]
    classes[3] = 0
    with pytest.raises(DataError, match=r"rows.txt:1: its labelled words are 20 tokens long, and model.context_length"):
        stream(classes)


def test_the_key_of_a_store_depends_on_the_labels(tmp_path):
    rows = [(f"text {i}", LABELS[i % 3]) for i in range(30)]
    keys = [open_store(table(tmp_path, rows)).key]
    keys.append(open_store(table(tmp_path, rows, labels=LABELS[::-1])).key)
    keys.append(open_store(table(tmp_path, rows, answers="text")).key)
    keys.append(open_store(table(tmp_path, [(x, LABELS[0]) if x == "text 1" else (x, y) for x, y in rows])).key)
    assert len(set(keys)) == 4
    assert open_store(table(tmp_path, rows)).key == keys[0]


def test_the_same_row_with_another_tag_has_another_key(register):
    keys = set()
    for tags in ("O|X", "X|O"):
        register([{"x": "a| b", "y": tags}] * 2)
        keys.add(open_store(DataConfig(source="task:ours", answers="classes")).key)
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("x", "hgih"), r"rows.jsonl, line 2: the answer 'hgih' is none of the labels; did you mean 'high'\?"),
        (("x", ""), r"rows.jsonl, line 2: column 'label' is empty"),
        (("", "low"), r"rows.jsonl, line 2: the prompt is empty"),
    ],
)
def test_rows_that_cannot_be_used_are_reported(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        open_store(table(tmp_path, [("a", "low"), row, ("b", "odd one")]))


def test_unknown_tags_and_words_without_tokens_are_reported(register):
    register([{"x": "a", "y": "O"}, {"x": "b", "y": "Y"}])
    with pytest.raises(DataError, match=r"rows.txt:2: the label 'Y' of 'b' is none of O, X"):
        open_store(DataConfig(source="task:ours", answers="classes"))
    register([{"x": "a|", "y": "O|X"}])
    with pytest.raises(DataError, match=r"rows.txt:1: '' has no token in this tokenizer, so the label 'X' has no"):
        open_store(DataConfig(source="task:ours", answers="classes"))


def test_a_classifier_has_one_set_of_labels(register):
    assert class_labels(DataConfig(source="task:sentiment", answers="classes")) == ("negative", "positive")
    assert class_labels(DataConfig(source="task:sentiment", labels=("a",))) == (), "answers are text"
    with pytest.raises(DataError, match=r"task:dialogue: has no class labels"):
        open_store(DataConfig(source="task:dialogue", answers="classes"))
    with pytest.raises(DataError, match=r"task:sentiment: its labels are negative, positive, not a, b"):
        class_labels(DataConfig(source="task:sentiment", answers="classes", labels=("a", "b")))
    with pytest.raises(DataError, match=r"task:entities: its labels are O, .*, not negative, positive"):
        class_labels(DataConfig(source=("task:sentiment", "task:entities"), answers="classes"))
    register([], labels=("negative", "positive"))
    both = DataConfig(source="task:sentiment", val_source="task:ours", answers="classes")
    assert class_labels(both) == ("negative", "positive")


def test_a_label_is_at_the_last_token_of_its_part():
    parts = (TextPart("ab", False, "y"), TextPart("c", False), TextPart("d", False, "x"))
    part_ids = [np.array([1, 2]), np.array([3]), np.array([4])]
    assert token_classes(Example(parts, "f:1"), part_ids, ("x", "y")).tolist() == [-1, 1, -1, 0]
    assert Example(parts, "f:1").prompt == "abcd", "all of it is the prompt"


@pytest.mark.usefixtures("real_data")
def test_messages_are_words_with_tags_or_text_answers():
    task, data = TASKS["entities"], DataConfig(answers="classes")
    assert task.classes == TAGS and len(TAGS) == 13
    for split in ("train", "validation", "test"):
        in_text = list(load_examples("task:entities", DataConfig(), split))
        tagged = list(load_examples("task:entities", data, split))
        for text, words in zip(in_text, tagged, strict=True):
            assert text.where == words.where and words.prompt == text.values["tokens"]
            labels = [part.label for part in words.parts]
            assert " ".join(labels) == text.values["tags"]
            assert task.tagging.answer(words.values, labels) == text.answer
    assert tags_of(answer_of(["a", "b"], ["B-person", "O"]), ["a", "b"]) == ["B-person", "O"]
