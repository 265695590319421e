"""DPO against its formula in float64, and at the answer that is known: the reference times exp(reward / beta)."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, tiny_model

from gptjax.data.batches import Batch
from gptjax.data.examples import load_examples
from gptjax.errors import DataError
from gptjax.model.gpt import GPT, init_params
from gptjax.objectives.dpo import dpo_loss
from gptjax.objectives.reference import ReferenceModel
from gptjax.training import train
from gptjax.training.run import open_run


class Reference(ReferenceModel):
    """A reference model that is there already."""

    def __init__(self, gpt: GPT):
        self._gpt = gpt

    @property
    def gpt(self) -> GPT:
        return self._gpt


def random_batch(rows=6, length=9, vocab=11, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    weights = (rng.random((rows, length)) < 0.4).astype(np.float32)
    weights[:, 3] = 1
    return Batch(*(rng.integers(0, vocab, (rows, length)).astype(np.int32) for _ in "ab"), weights)


def log_probabilities(model, params, batch) -> np.ndarray:
    logits = np.asarray(GPT(model).apply({"params": params}, batch.tokens), np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return (np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0] * batch.loss_weights).sum(-1)


def test_the_loss_is_the_formula_in_float64():
    model, beta, batch = tiny_model(), 0.3, random_batch()
    ours, theirs = (jax.tree.map(lambda x: 4 * x, init_params(model, jax.random.key(i))) for i in (0, 1))
    loss = dpo_loss(Reference(GPT(model)), beta)
    minimised, shown = loss.sums(ours, batch, GPT(model), {}, theirs)
    ratio = log_probabilities(model, ours, batch) - log_probabilities(model, theirs, batch)
    margin = beta * (ratio[::2] - ratio[1::2])
    expected = np.log1p(np.exp(-margin))
    assert np.ptp(margin) > 0.5 and 0 < (margin > 0).mean() < 1
    np.testing.assert_allclose([minimised, shown["loss"]], expected.sum(), rtol=1e-4)
    assert shown["accuracy"] == (margin > 0).sum() and loss.normalizer(batch) == 3
    empty = batch._replace(loss_weights=batch.loss_weights * (np.arange(6) < 4)[:, None])
    assert loss.normalizer(empty) == 2
    np.testing.assert_allclose(loss.sums(ours, empty, GPT(model), {}, theirs)[0], expected[:2].sum(), rtol=1e-4)


class Table:
    """A model that is one row of logits: what follows any token."""

    __class__ = GPT  # for the type checker of the tests

    config = SimpleNamespace(vocab_size=5)

    def apply(self, variables, x, *more, method, rngs=None):
        if method == "hidden_states":
            return jnp.zeros((*x.shape, 1))
        return jnp.broadcast_to(variables["params"], (*x.shape[:2], len(variables["params"])))


@pytest.mark.slow
def test_over_all_pairs_of_all_answers_the_best_model_is_the_one_of_the_theorem():
    """Preferences by Bradley and Terry's model of a reward: the minimum is reference x exp(reward / beta)."""
    rng, count, beta = np.random.default_rng(0), 5, 0.7
    reference, reward = jnp.asarray(rng.normal(size=count)), rng.normal(size=count)
    pairs = list(itertools.permutations(range(count), 2))
    chance = np.array([1 / (1 + np.exp(reward[j] - reward[i])) for i, j in pairs])  # that i is preferred to j
    loss = dpo_loss(Reference(Table()), beta)

    def expected(params):
        def one(pair):
            batch = Batch(jnp.zeros((2, 1), int), pair[:, None], jnp.ones((2, 1)))
            return loss.sums(params, batch, Table(), {}, reference)[0]

        return (jax.vmap(one)(jnp.array(pairs)) * chance).sum()

    best = reference + reward / beta
    assert abs(jax.grad(expected)(best)).max() < 1e-6 < 1e-2 < abs(jax.grad(expected)(reference)).max()
    assert all(expected(best) < expected(best + 0.3 * rng.normal(size=count)) for _ in range(20))


@pytest.fixture
def pairs(tmp_path):
    """Endings that are preferred and ones that are not, to many prompts."""
    rows = [f'{{"q": "item {i}", "good": "yes {i % 7}", "bad": "no {i % 5}"}}' for i in range(300)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    return {"data.source": str(tmp_path / "pairs.jsonl"), "data.prompt": "{q}:", "data.answer": "{good}",
            "data.rejected": "{bad}", "objective.name": "dpo", "model.context_length": 16}  # fmt: skip


def test_a_worse_answer_follows_each_better_one(pairs, tmp_path):
    data = TINY.override(pairs).data
    found = list(load_examples(data.source, data, "train"))
    for better, worse in zip(found[::2], found[1::2], strict=True):
        assert better.prompt == worse.prompt and better.where == worse.where
        assert better.answer.startswith("yes") and worse.answer.startswith("no")
    with (tmp_path / "pairs.jsonl").open("a") as table:
        table.write('{"q": "x", "good": "a", "bad": "a"}\n')
    assert list(load_examples(data.source, data, "train")) == found, "two answers that are one teach nothing"
    with (tmp_path / "pairs.jsonl").open("a") as table:
        table.write('{"q": "x", "good": "a", "bad": " "}\n')
    with pytest.raises(DataError, match=r"line 302: the rejected answer is empty"):
        list(load_examples(data.source, data, "train"))


@pytest.mark.slow
@pytest.mark.usefixtures("single_device")
def test_a_run_prefers_the_chosen_answers_and_keeps_pairs_in_one_batch(pairs, tmp_path, finished_run):
    e = TINY.override(pairs | {"init": str(finished_run), "data.tokenizer": "init", "train.steps": 30,
                               "objective.beta": 0.5, "train.microbatches": 2})  # fmt: skip
    figures = train.train(e, tmp_path / "run")
    assert figures["val_accuracy"] > 0.95 and figures["val_loss"] < 0.4
    assert "val_bits_per_byte" not in figures and figures["val_answers"] > 10
    first = open_run(tmp_path / "run").metrics()[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5), "at the start both answers are as likely as they were"
