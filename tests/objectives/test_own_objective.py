"""An objective of one's own is one file outside gptjax: SimPO against its formula in NumPy, and in a run."""

import json
import sys

import jax
import numpy as np
import pytest
from conftest import TINY, tiny_model

from gptjax.checks import check
from gptjax.data.batches import Batch
from gptjax.errors import ConfigError, RunError
from gptjax.model.gpt import GPT, init_params
from gptjax.objectives import OBJECTIVES, Objective, make_objective
from gptjax.training import train
from gptjax.training.evaluation import evaluate_run
from gptjax.training.run import open_run


@pytest.fixture
def simpo(tmp_path):
    """An experiment on pairs of answers."""
    rows = [{"q": f"item {i}", "good": f"yes {i % 7}", "bad": f"no {i % 5} {i % 3}"} for i in range(200)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dict(source=str(tmp_path / "pairs.jsonl"), prompt="{q}:", answer="{good}", rejected="{bad}")
    objective = dict(name="simpo:SimPO", beta=2.0)
    return TINY.override(data=data, objective=objective, train=dict(steps=20, sample_tokens=0, eval_every=0))


def test_the_loss_is_the_formula_in_numpy(simpo):
    rng, model = np.random.default_rng(0), tiny_model()
    weights = (rng.random((6, 9)) < 0.5).astype(np.float32)
    weights[:, 2] = 1
    tokens, targets = rng.integers(0, 11, (2, 6, 9)).astype(np.int32)
    batch = Batch(tokens, targets, weights)
    params = jax.tree.map(lambda x: 4 * x, init_params(model, jax.random.key(0)))
    loss = make_objective(simpo).loss(None)
    total, metrics = loss.sums(params, batch, GPT(model), {}, None)

    logits = np.asarray(GPT(model).apply({"params": params}, tokens), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_probs = np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    means = (log_probs * weights).sum(-1) / weights.sum(-1)
    margins = 2.0 * (means[::2] - means[1::2]) - 0.5
    np.testing.assert_allclose([total, metrics["loss"]], np.log1p(np.exp(-margins)).sum(), rtol=1e-5)
    assert metrics["accuracy"] == (means[::2] > means[1::2]).sum() and loss.normalizer(batch) == 3


@pytest.mark.usefixtures("single_device")
def test_it_trains_resumes_and_prefers_the_chosen_answers(simpo, tmp_path):
    short = train.train(simpo.override({"train.steps": 10, "optim.schedule": "constant"}), tmp_path / "run")
    metrics = train.train(simpo.override({"optim.schedule": "constant"}), tmp_path / "run", allow_changes=True)
    assert metrics["val_loss"] < short["val_loss"] < 1.1 and metrics["val_accuracy"] > 0.9
    assert "val_bits_per_byte" not in metrics


def test_its_rules_are_checked_like_those_of_gptjax(simpo):
    wrong = {"train.batch_size": 9, "objective.mask_rate": 0.3, "objective.z_loss": 0.1, "data.rejected": None}
    with pytest.raises(ConfigError) as caught:
        check(simpo.override(wrong))
    for named in ("data.rejected", "2 rows together", "set objective.name = 'mlm'", "z_loss = 0.1: has no effect"):
        assert named in str(caught.value)


@pytest.mark.usefixtures("single_device")
def test_a_run_folder_never_imports_an_objective(simpo, tmp_path, monkeypatch):
    train.train(simpo.override({"train.steps": 3}), tmp_path / "run")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "run" / "experiment.json"
    file.write_text(file.read_text().replace("simpo:SimPO", "evil:SimPO"))
    run = open_run(tmp_path / "run")
    with pytest.raises(RunError, match=r"objective\.name = 'evil:SimPO' names code"):
        evaluate_run(run)
    assert "evil" not in sys.modules and not (tmp_path / "it_ran").exists()


def test_the_fields_of_every_objective_exist():
    config = TINY.objective
    for kind in OBJECTIVES.values():
        assert issubclass(kind, Objective) and all(hasattr(config, field) for field in kind.fields)
    claimed = {field for kind in OBJECTIVES.values() for field in kind.fields}
    assert claimed == set(vars(config)) - {"name"}, "each field belongs to an objective"
