"""A head for classes on tasks: sentences get a label, words get tags, and both are scored as answers in text are."""

from functools import partial

import jax
import numpy as np
import pytest
from conftest import tiny_model

pytest.importorskip("sacrebleu", reason="the extra `tasks` is not installed")
from seqeval.metrics import f1_score
from sklearn.metrics import log_loss

from gptjax.data import tasks
from gptjax.data.tasks import Task
from gptjax.data.tasks.entities import TAGS, TASK, answer_of
from gptjax.data.tokenizer import ByteTokenizer
from gptjax.errors import DataError
from gptjax.inference.classes import ClassQuery, class_log_probs
from gptjax.inference.pretrained import Pretrained
from gptjax.model.gpt import GPT, init_params
from gptjax.tuning.tasks import evaluate_task


def random_model(labels, context=48, **changes):
    model = tiny_model(vocab_size=257, context_length=context, num_classes=len(labels), **changes)
    params = jax.tree.map(lambda x: 8 * x, init_params(model, jax.random.key(0)))
    return Pretrained("random", model, params, ByteTokenizer(), labels=labels)


def logs_of(pretrained, text):
    """ln of the probability of every class at every byte of a text, by itself and in float64."""
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    padding = pretrained.model.context_length - len(ids) if pretrained.model.causal else 0  # which nothing sees
    tokens = np.pad(ids, (0, padding))[None]
    logits = np.float64(_logits(pretrained.params, tokens, model=pretrained.model))[0, : len(ids)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@partial(jax.jit, static_argnames="model")
def _logits(params, tokens, *, model):
    return GPT(model).apply({"params": params}, tokens)


@pytest.fixture
def register(monkeypatch, tmp_path):
    """Puts a task of these rows, the same on every side, in the place of another."""

    def make(rows, **given) -> Task:
        task = Task(
            name="ours", summary="",
            load_rows=lambda split, folder: ((r, f"rows.txt:{i}") for i, r in enumerate(rows, 1)),
            baseline="majority", source="", licence="", **given,
        )  # fmt: skip
        monkeypatch.setitem(tasks.TASKS, "ours", task)
        return task

    monkeypatch.setenv("GPTJAX_DATA", str(tmp_path))
    return make


WORDS = ["Jane", "Doe", "saw", "Paris", ",", "Ünal", "and", "the", "Acme", "Works", "."]


def messages(count):
    """Messages without a word twice, so that what an answer in text names can be found again without doubt."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens = rng.permutation(WORDS)[: rng.integers(2, 6)].tolist()
        tags = [str(rng.choice(["O", "B-person", "I-person", "B-location"])) for _ in tokens]
        yield {"tokens": " ".join(tokens), "tags": " ".join(tags), "entities": answer_of(tokens, tags)}


@pytest.mark.parametrize("causal", [True, False])
def test_the_f1_of_tags_is_that_of_seqeval(register, causal):
    rows = list(messages(20 if causal else 6))
    task = register(rows, prompt=TASK.prompt, answer=TASK.answer, metrics=("f1",), tagging=TASK.tagging)
    model = random_model(TAGS, causal=causal)
    figures, predictions = evaluate_task(model, task, batch_size=3)
    made, true, nats = [], [], []
    for row, p in zip(rows, predictions, strict=True):
        ends = np.cumsum([len(word.encode()) + 1 for word in row["tokens"].split()]) - 2
        told = logs_of(model, row["tokens"])[ends]
        made.append([TAGS[i] for i in told.argmax(-1)])
        true.append(row["tags"].split())
        nats.append(-told[np.arange(len(ends)), [TAGS.index(tag) for tag in true[-1]]].sum())
        assert p.prediction == answer_of(row["tokens"].split(), made[-1]) and p.references == (row["entities"],)
        assert p.nats == pytest.approx(nats[-1], rel=1e-4) and not p.shortened
    expected = f1_score(true, made)
    assert figures["f1"] == pytest.approx(expected) and 0 < expected < 1
    assert figures["loss"] == pytest.approx(sum(nats) / sum(map(len, true)), rel=1e-4), "nats a tag"
    assert "bits_per_byte" not in figures and figures["f1_difference"] == figures["f1"] - figures["f1_baseline"]


def test_a_sentence_gets_the_most_probable_label(register):
    labels = ("yes", "no", "maybe")
    rows = [{"x": "x" * (7 * i % 40) + chr(97 + i), "y": labels[i % 3]} for i in range(17)]
    task = register(rows, prompt="{x} so", answer=" {y}\n", labels=labels, metrics=("accuracy",))
    model = random_model(labels, context=32)
    figures, predictions = evaluate_task(model, task, batch_size=4)
    told = np.array([logs_of(model, f"{row['x']} so"[-32:])[-1] for row in rows])
    assert [p.prediction for p in predictions] == [labels[i] for i in told.argmax(-1)]
    truth = [row["y"] for row in rows]
    assert figures["accuracy"] == np.mean([p.prediction == y for p, y in zip(predictions, truth, strict=True)])
    order = np.argsort(labels)
    assert figures["loss"] == pytest.approx(log_loss(truth, np.exp(told[:, order]), labels=sorted(labels)), rel=1e-4)
    assert figures["shortened"] == sum(len(row["x"]) > 29 for row in rows) > 0
    drawn, some = evaluate_task(model, task, limit=5, seed=3)
    answers = {(p.where, p.prediction, p.references) for p in predictions}
    assert drawn["examples"] == 5 and {(p.where, p.prediction, p.references) for p in some} < answers


def test_a_text_scores_the_same_in_any_batch():
    model = random_model(("a", "b"), causal=False)
    ids = [np.arange(size, dtype=np.int32) for size in (3, 48, 20, 21)]
    together = class_log_probs(model, [ClassQuery(i, np.arange(len(i))) for i in ids], batch_size=4)
    for own, found in zip(ids, together, strict=True):
        alone = logs_of(model, bytes(own.tolist()).decode())
        np.testing.assert_allclose(found, alone, atol=1e-4)
    rounded = class_log_probs(model, [ClassQuery(ids[1], np.array([47]))], dtype="int8")[0]
    np.testing.assert_allclose(rounded, together[1][47:], atol=0.5)


def test_a_model_of_other_labels_or_of_too_short_a_context_is_refused(register):
    rows = list(messages(3))
    register(rows, prompt=TASK.prompt, answer=TASK.answer, metrics=("f1",), tagging=TASK.tagging)
    with pytest.raises(
        DataError, match=r"random: predicts yes, no, but task:ours expects the labels O, .*; use a model"
    ):
        evaluate_task(random_model(("yes", "no")), tasks.TASKS["ours"])
    with pytest.raises(DataError, match=r"rows.txt:\d: its labelled words are \d+ tokens long, .* random is 8;"):
        evaluate_task(random_model(TAGS, context=8), tasks.TASKS["ours"])
    dialogue = register([{"x": "a", "y": "b"}], prompt="{x}", answer="{y}", metrics=("chrf",))
    with pytest.raises(DataError, match="task:ours expects text"):
        evaluate_task(random_model(TAGS), dialogue)
