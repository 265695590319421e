"""Models whose answers are known, on tasks made here."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model

pytest.importorskip("sacrebleu", reason="the extra `tasks` is not installed")

from gptjax.data import tasks
from gptjax.data.tasks import Task, TextPart
from gptjax.data.tokenizer import ByteTokenizer
from gptjax.errors import DataError, PromptError
from gptjax.inference.pretrained import Pretrained
from gptjax.model.gpt import GPT, init_params
from gptjax.tuning.tasks import evaluate_task

END = 256


def random_model(context=96, scale=6.0):
    model = tiny_model(vocab_size=257, context_length=context)
    params = jax.tree.map(lambda x: scale * x, init_params(model, jax.random.key(0)))
    return Pretrained("random", model, params, ByteTokenizer())


def chain(*words, context=64):
    """A model that looks at the last byte only, and goes on as these words do, each to the end of the text."""
    model = tiny_model(vocab_size=257, embed_dim=257, num_heads=1, num_layers=1, positions="none", ffn_dim=1,
                       tie_embeddings=False, context_length=context)  # fmt: skip
    params = jax.tree.map(jnp.zeros_like, init_params(model, jax.random.key(0)))
    follows = np.zeros((257, 257), np.float32)
    for word in words:
        ids = [*word.encode(), END]
        follows[ids[:-1], ids[1:]] = 1.0
    params["embedding"] = {"tokens": jnp.eye(257), "head": jnp.asarray(follows)}
    params["final_norm"]["scale"] = jnp.ones(257)
    return Pretrained("chain", model, params, ByteTokenizer())


@pytest.fixture
def register(monkeypatch):
    """Makes a task of rows, the same on every side, and of what else is said about it."""

    def make(rows, **changes) -> Task:
        def read(side, folder):
            return ((row, f"rows.txt:{i}") for i, row in enumerate(rows, 1))

        given = dict(prompt="{x}", answer="{y}\n", metrics=("exact_match",), baseline="majority", max_new_tokens=8)
        task = Task(name="ours", summary="", load_rows=read, source="", licence="", **(given | changes))
        monkeypatch.setitem(tasks.TASKS, "ours", task)
        return task

    return make


def brute_nats(pretrained, prompt: str, answer: str) -> float:
    """-ln of the probability of an answer after a prompt, from the logits of the whole text."""
    ids = np.frombuffer((prompt + answer).encode(), np.uint8).astype(np.int32)
    padded = np.zeros((1, pretrained.model.context_length), np.int32)
    padded[0, : len(ids)] = ids
    logits = _logits(pretrained.params, padded, model=pretrained.model)[0, : len(ids) - 1]
    logs = jax.nn.log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]
    return -float(logs[len(prompt.encode()) - 1 :].sum())


@partial(jax.jit, static_argnames="model")
def _logits(params, ids, *, model):
    return GPT(model).apply({"params": params}, ids)


@pytest.mark.slow
def test_the_most_probable_label_is_chosen_and_its_likelihood_is_the_models(register):
    texts = ["a fine day", "bad", "why not", "so much of it, for so long", "é", "a", "b", "end"]
    labels = ("yes", "no, never", "maybe")
    rows = [{"x": x, "y": labels[i % 2]} for i, x in enumerate(texts)]
    task = register(rows, prompt="Q: {x}\nA:", answer=" {y}\n", labels=labels, metrics=("accuracy", "exact_match"))
    model = random_model()
    figures, predictions = evaluate_task(model, task, batch_size=3)
    correct = []
    for row, p in zip(rows, predictions, strict=True):
        nats = {label: brute_nats(model, f"Q: {row['x']}\nA:", f" {label}\n") for label in labels}
        assert (p.prompt, p.references, p.shortened) == (f"Q: {row['x']}\nA:", (row["y"],), False)
        assert p.prediction == min(nats, key=nats.get) and p.nats == pytest.approx(nats[row["y"]], rel=1e-4)
        correct.append(p.prediction == row["y"])
    assert figures["accuracy"] == figures["exact_match"] == np.mean(correct)
    nats, tokens = sum(p.nats for p in predictions), sum(len(f" {r['y']}\n") for r in rows)
    assert figures["loss"] == pytest.approx(nats / tokens)
    assert figures["bits_per_byte"] == pytest.approx(nats / tokens / math.log(2)), "a token is a byte here"
    assert figures["accuracy_baseline"] == 0.5 and {p.baseline for p in predictions} <= set(labels)
    assert figures["accuracy_difference"] == figures["accuracy"] - 0.5
    assert (figures["examples"], figures["shortened"]) == (8, 0)


@pytest.mark.slow
def test_known_answers_are_written_to_the_end_of_their_line_and_in_order(register):
    """The chain says what follows the prompt's last letter; the batches are sorted by length, the answers are not."""
    model = chain("1ab\nno", "2cde", "3fghijklmnopq")
    rows = [{"x": "." * (5 * i % 7) + key, "y": y} for i, (key, y) in enumerate(
        [("1", "ab"), ("2", "cde"), ("1", "xy"), ("3", "fghijklmX"), ("2", "cde")])]  # fmt: skip
    figures, predictions = evaluate_task(
        model, register(rows, metrics=("exact_match", "edit_distance", "chrf")), batch_size=2
    )
    assert [p.prediction for p in predictions] == ["ab", "cde", "ab", "fghijklm", "cde"], "8 tokens at most"
    assert [p.where for p in predictions] == [f"rows.txt:{i}" for i in range(1, 6)]
    assert figures["exact_match"] == 0.6 and figures["exact_match_baseline"] == 0.4
    low, high = figures["exact_match_interval"]
    assert low < 0.6 < high
    assert figures["edit_distance"] == pytest.approx((1 + 1 / 9) / 5)
    assert figures["edit_distance_difference"] < 0 < figures["chrf_difference"]
    assert "version:" in figures["chrf_signature"]


def test_another_model_replaces_the_baseline(register):
    rows = [{"x": "1", "y": "ab"}, {"x": "2", "y": "cde"}, {"x": "1", "y": "ab"}]
    figures, predictions = evaluate_task(chain("1ab", "2cd"), register(rows), against=chain("1xy", "2cde"))
    assert [p.prediction for p in predictions] == ["ab", "cd", "ab"]
    assert [p.baseline for p in predictions] == ["xy", "cde", "xy"]
    assert figures["exact_match"] == 2 / 3 and figures["exact_match_baseline"] == 1 / 3
    assert figures["exact_match_difference"] == pytest.approx(1 / 3)


@pytest.mark.slow
def test_answers_are_drawn_by_the_seed_alone(register):
    task, model = register([{"x": str(i), "y": "a"} for i in range(6)]), random_model(scale=2.0)
    drawn = [[p.prediction for p in evaluate_task(model, task, seed=seed, batch_size=size, temperature=1.0)[1]]
             for seed, size in ((0, 2), (0, 6), (1, 2))]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 6


def test_answers_of_several_lines_are_not_cut_at_the_first(register):
    rows = [{"x": "1", "y": "ab\nno"}, {"x": "2", "y": "cde"}]
    figures, _ = evaluate_task(chain("1ab\nno", "2cde"), register(rows, answer="{y}"))
    assert figures["exact_match"] == 1.0


def test_long_prompts_lose_their_beginning_and_are_counted(register):
    rows = [{"x": "z" * 200 + "1", "y": "ab"}, {"x": "2", "y": "cde"}, {"x": "z" * 55 + "1", "y": "ab"}]
    figures, predictions = evaluate_task(chain("1ab", "2cde"), register(rows))
    assert [p.shortened for p in predictions] == [True, False, False] and figures["shortened"] == 1
    assert figures["exact_match"] == 1.0 and predictions[0].prompt == rows[0]["x"], "kept whole in what is written"
    with pytest.raises(PromptError, match="the context of chain is 64, and 64 tokens are reserved for an answer"):
        evaluate_task(chain("a"), register(rows, max_new_tokens=64))
    with pytest.raises(DataError, match=r"rows.txt:1: the answer has 71 tokens; it must have 1 to 64"):
        evaluate_task(chain("a"), register([{"x": "a", "y": "b" * 70}]))


def test_the_last_turn_of_a_dialogue_is_answered_after_what_was_truly_said(register):
    def parts(row):
        return (
            TextPart(f"U: {row['x']}1", False),
            TextPart("ab\n", True),
            TextPart("U: so 2", False),
            TextPart("cdX\n", True),
        )

    task = register([{"x": "hello"}, {"x": "hi"}], parts=parts, prompt="{x}", metrics=("exact_match",))
    figures, predictions = evaluate_task(chain("1ab", "2cde"), task)
    assert [p.prediction for p in predictions] == ["cde"] * 2
    assert predictions[0].prompt == "U: hello1ab\nU: so 2" and predictions[0].references == ("cdX",)
    assert (figures["examples"], figures["exact_match"]) == (2, 0.0)


def test_a_limit_draws_examples_and_keeps_their_order(register):
    task = register([{"x": f"{i:02}1", "y": "ab"} for i in range(20)])
    drawn = [[p.where for p in evaluate_task(chain("1ab"), task, limit=n, seed=s)[1]] for n, s in
             [(5, 0), (5, 0), (0.25, 0), (5, 1)]]  # fmt: skip
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3]
    numbers = [int(where.split(":")[1]) for where in drawn[0]]
    assert numbers == sorted(numbers) and len(set(numbers)) == 5 and numbers != [1, 2, 3, 4, 5]
    with pytest.raises(DataError, match="task:ours: its test split has no example"):
        evaluate_task(chain("1ab"), register([]))
