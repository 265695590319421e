"""Distillation against the sum over all tokens in float64."""

import jax
import numpy as np
import pytest
from conftest import TINY, tiny_model, write_corpus
from test_preference import random_batch

from gptjax.model.gpt import GPT, init_params
from gptjax.objectives.distill import distillation_loss
from gptjax.objectives.reference import ReferenceModel
from gptjax.training import train


class Reference(ReferenceModel):
    """A reference model that is there already."""

    def __init__(self, gpt: GPT):
        self._gpt = gpt

    @property
    def gpt(self) -> GPT:
        return self._gpt


def float64_logs(model, params, batch, common) -> np.ndarray:
    logits = np.asarray(GPT(model).apply({"params": params}, batch.tokens), np.float64)[..., :common]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_the_divergence_is_the_sum_over_all_tokens(divergence):
    student, teacher = tiny_model(), tiny_model(vocab_size=13, num_layers=3)  # whose table is padded
    ours, theirs = (
        jax.tree.map(lambda x: 4 * x, init_params(m, jax.random.key(i))) for i, m in enumerate((student, teacher))
    )
    batch = random_batch()
    loss = distillation_loss(Reference(GPT(teacher)), divergence)
    minimised, shown = loss.sums(ours, batch, GPT(student), {}, theirs)
    p, q = float64_logs(teacher, theirs, batch, 11), float64_logs(student, ours, batch, 11)
    first, second = (p, q) if divergence == "forward" else (q, p)
    expected = ((np.exp(first) * (first - second)).sum(-1) * batch.loss_weights).sum()
    np.testing.assert_allclose([minimised, shown["divergence"]], expected, rtol=1e-4)
    nats = -np.take_along_axis(q, batch.targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(shown["loss"], (nats * batch.loss_weights).sum(), rtol=1e-4)
    assert loss.normalizer(batch) == batch.loss_weights.sum() and expected > 1


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_model_that_is_its_teacher_has_nothing_to_learn(divergence):
    model = tiny_model()
    params = jax.tree.map(lambda x: 4 * x, init_params(model, jax.random.key(0)))
    loss = distillation_loss(Reference(GPT(model)), divergence)
    gradient = jax.grad(lambda p: loss.sums(p, random_batch(), GPT(model), {}, params)[0])(params)
    assert max(float(abs(x).max()) for x in jax.tree.leaves(gradient)) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("single_device")
def test_a_student_comes_near_its_teacher(tmp_path, finished_run):
    e = TINY.override({
        "data.source": str(write_corpus(tmp_path)), "data.tokenizer": "init", "objective.name": "distill",
        "objective.reference": str(finished_run), "train.steps": 40, "train.log_every": 1, "model.num_layers": 1,
    })  # fmt: skip
    figures = train.train(e, tmp_path / "student")
    from gptjax.training.run import open_run

    lines = [line for line in open_run(tmp_path / "student").metrics() if "divergence" in line]
    assert figures["val_divergence"] < 0.3 * lines[0]["divergence"] and figures["val_bits_per_byte"] > 0
