"""DP-SGD: its gradient against one window at a time, its noise and draws against their distributions.

Its accountant against what is known in closed form, and against quadrature in float64.
"""

import functools
import json
import math
import shutil
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_same, fine_tuning, restored, tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gptjax.checks import check
from gptjax.config import Experiment
from gptjax.data.batches import Batch
from gptjax.data.poisson import PoissonSampler
from gptjax.errors import ConfigError, GptjaxError, RunError
from gptjax.model.gpt import GPT
from gptjax.sharding import one_device
from gptjax.training.diagnosis import replay
from gptjax.training.privacy import DPConfig, add_noise, private_gradient, spent, spent_by
from gptjax.training.run import open_run
from gptjax.training.state import init_state
from gptjax.training.step import TOKEN_LOSS, mean_gradient, train_step
from gptjax.training.train import train
from gptjax.training.train_setup import build_train_setup

QUIET, KEY = 1e-12, (1, 2)  # too little noise to be seen, and what it is drawn from
PRIVATE = {"optim.noise_multiplier": 1.0, "optim.clip_norm": 0.5}


@pytest.fixture(scope="module")
def library():
    pytest.importorskip("jax_privacy", reason="pip install 'gptjax[private]'")


def phi(x):
    return 0.5 * math.erfc(-x / 2**0.5)


def renyi(order, q, sigma):
    """The divergence of one step by definition: D((1 - q) N(0, s^2) + q N(1, s^2) || N(0, s^2)), by quadrature."""
    z = np.linspace(-12 * sigma, 12 * sigma + order, 400_001)
    log_density = -((z / sigma) ** 2) / 2 - math.log(sigma * math.sqrt(2 * math.pi))
    log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * z - 1) / (2 * sigma**2))
    power = log_density + order * log_ratio
    return (power.max() + math.log(np.trapezoid(np.exp(power - power.max()), z))) / (order - 1)


@pytest.mark.parametrize("q, sigma, steps, delta", [(0.01, 4.0, 10_000, 1e-5), (0.05, 1.1, 300, 1e-6)])
def test_the_moments_are_those_of_the_definition(library, q, sigma, steps, delta):
    orders = [*np.arange(1.5, 12, 0.5), *range(12, 65)]
    bounds = [steps * renyi(order, q, sigma) + math.log(1 / delta) / (order - 1) for order in orders]
    assert spent(q, sigma, steps, delta).moments == pytest.approx(min(bounds), rel=2e-3)


@pytest.mark.parametrize("sigma, steps", [(1.0, 1), (4.0, 10), (20.0, 100)])
def test_epsilon_is_exact_where_all_examples_are_in_every_batch(library, sigma, steps):
    """Then all steps are one Gaussian mechanism with noise sigma / sqrt(steps), of which delta is known.

    Balle & Wang 2018, theorem 8.
    """
    delta, s = 1e-5, sigma / math.sqrt(steps)
    found = spent(1.0, sigma, steps, delta)
    exact = phi(1 / (2 * s) - found.epsilon * s) - math.exp(found.epsilon) * phi(-1 / (2 * s) - found.epsilon * s)
    assert exact == pytest.approx(delta, rel=0.02)
    assert found.moments >= found.epsilon


def test_more_steps_and_less_noise_cost_more(library):
    base = spent(0.02, 2.0, 500, 1e-5)
    for worse in [(0.02, 2.0, 1000, 1e-5), (0.02, 1.5, 500, 1e-5), (0.04, 2.0, 500, 1e-5), (0.02, 2.0, 500, 1e-6)]:
        assert all(np.array(spent(*worse)) > base)


@pytest.mark.parametrize(
    "values, name",
    [((0.0, 1, 1, 0.1), "sampling_rate = 0.0"), ((0.5, 0, 1, 0.1), "noise_multiplier = 0"), ((1, 1, 0, 0.1), "steps"),
     ((1, 1, 1, 1.0), "delta = 1.0")],
)  # fmt: skip
def test_values_out_of_range_are_refused(values, name):
    with pytest.raises(GptjaxError, match=name):
        spent(*values)


def test_without_the_library_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(GptjaxError, match=r"pip install 'gptjax\[private\]'"):
        spent(0.1, 1.0, 10, 1e-5)


@pytest.fixture(scope="module")
def tiny():
    """A model, its state and a batch in two microbatches, with one window that asks for nothing."""
    e = Experiment().override(
        {"model.context_length": 16, "model.num_layers": 1, "model.embed_dim": 16, "model.num_heads": 2}
    )
    e = e.resolved(11)
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 11, (2, 2, 4, 16)).astype(np.int32)
    weights = (rng.random((2, 4, 16)) < 0.7).astype(np.float32)
    weights[1, 3] = 0
    return GPT(e.model), init_state(e, optax.identity()), Batch(tokens, targets, weights)


@functools.cache  # compiled once for all examples with the same noise
def compiled_gradient(model, noise):
    return jax.jit(private_gradient(model, TOKEN_LOSS, None, noise))


def private(tiny, batch, noise):
    model, state, _ = tiny
    return compiled_gradient(model, noise)(state, batch, None)


def test_the_gradient_is_that_of_windows_one_by_one(library, tiny):
    model, state, batch = tiny
    alone, nats = [], 0.0
    gradient = jax.jit(mean_gradient(model, TOKEN_LOSS))
    for part in range(2):
        for row in range(4):
            window = jax.tree.map(lambda x, p=part, r=row: x[p : p + 1, r : r + 1], batch)
            shown, grads = gradient(state, window, None)
            alone.append(grads)
            nats += float(shown["loss"] * window.loss_weights.sum())
    norms = np.array([optax.tree.norm(g) for g in alone])
    limit = float(np.median(norms))
    assert norms.min() == 0 < limit < norms.max(), "some are to be clipped, some are not, and one is empty"
    scale = np.minimum(1, limit / np.maximum(norms, 1e-30))
    expected = jax.tree.map(lambda *g: sum(s * x for s, x in zip(scale, g, strict=True)) / 5.5, *alone)
    shown, grads = private(tiny, batch, DPConfig(limit, QUIET, 5.5, KEY))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, expected)
    assert float(shown["loss"]) == pytest.approx(nats / batch.loss_weights.sum(), rel=1e-5)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(row=st.integers(0, 7), seed=st.integers(0, 2**16), limit=st.sampled_from([1e-3, 0.1, 10.0]))
def test_no_window_moves_the_gradient_by_more_than_the_norm(library, tiny, row, seed, limit):
    batch = tiny[2]
    tokens, weights = batch.tokens.copy(), batch.loss_weights.copy()
    tokens[row // 4, row % 4] = np.random.default_rng(seed).integers(0, 11, 16)
    weights[row // 4, row % 4] = 0
    there, changed, empty = (
        private(tiny, b, DPConfig(limit, QUIET, 4.0, KEY))[1]
        for b in (batch, batch._replace(tokens=tokens), batch._replace(loss_weights=weights))
    )
    for other, times in [(empty, 1), (changed, 2)]:
        moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, there, other))
        assert float(moved) <= times * limit / 4.0 * (1 + 1e-4)


def test_noise_is_normal_and_its_own_in_every_weight_and_step(library):
    zeros = {"a": np.zeros((40, 50), np.float32), "b": np.zeros(2000, np.float32)}
    drawn = [add_noise(zeros, step, DPConfig(0.5, 3.0, 6.0, KEY)) for step in range(4)]
    samples = np.array([np.asarray(x).ravel() for noise in drawn for x in noise.values()])
    assert stats.kstest(samples.ravel() / (3.0 * 0.5 / 6.0), "norm").pvalue > 1e-3
    correlations = np.corrcoef(samples)[np.triu_indices(len(samples), 1)]
    assert np.abs(correlations).max() < 4.5 / math.sqrt(2000)


@pytest.mark.slow
def test_the_noise_is_in_every_update_and_only_on_trainable_weights(library, tiny):
    model, state, batch = tiny
    trainable = jax.tree.map_with_path(lambda path, x: path[0].key != "embedding", state.params)
    tx = optax.sgd(1.0)
    state = state._replace(opt_state=tx.init(state.params))

    @functools.cache
    def step_function(multiplier):
        grad_fn = private_gradient(model, TOKEN_LOSS, trainable, DPConfig(0.5, multiplier, 4.0, KEY))
        return jax.jit(partial(train_step, grad_fn=grad_fn, tx=tx, loss_decides=False))

    def update(step, multiplier):
        return step_function(multiplier)(state._replace(step=jnp.int32(step)), batch)[0].params

    moved = []
    for step in (3, 4):
        both = update(step, 2.0), update(step, QUIET)
        noise = jax.tree.map(lambda a, b: np.asarray(a - b), *both)
        assert all(not x.any() for x in jax.tree.leaves(noise["embedding"])), "what is frozen stays"
        moved.append(np.concatenate([x.ravel() for x in jax.tree.leaves(noise["blocks"])]))
    for noise in moved:
        assert noise.std() == pytest.approx(2.0 * 0.5 / 4.0, rel=0.08)
    assert abs(np.corrcoef(moved)[0, 1]) < 0.1, "another step, other noise"


def test_of_too_many_windows_some_are_left_out_by_chance():
    draws = PoissonSampler(num_windows=40, sampling_rate=1.0, max_batch=10)
    drawn = np.array([draws.draw(0, step) for step in range(4000)])
    assert drawn.shape == (4000, 10) and all(len(set(row)) == 10 for row in drawn.tolist())
    counts = np.bincount(drawn.ravel(), minlength=40)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("length", [8, 9])
def test_padding_has_no_targets_in_masked_text_either(length, tmp_path):
    """Whatever the text's length: whether or not its last token ends a window."""
    texts = []
    for name, size in (("a", 8 * 40 + 1), ("b", 8 * 30 + 3)):
        texts.append(tmp_path / f"{name}.txt")
        texts[-1].write_text("".join(chr(97 + i % 26) for i in range(size)))
    val = tmp_path / "val.txt"
    val.write_text("some other text, to look at" * 3)
    e = tiny_run(tmp_path, **PRIVATE | {"train.batch_size": 32, "model.context_length": length, "model.causal": False})
    e = e.override({"objective.name": "mlm", "train.sample_tokens": 0, "data.val_source": str(val)})
    batches = build_train_setup(e.override({"data.source": tuple(map(str, texts))}), one_device()).batches
    empty = batches.make_examples(np.full(4, batches.sampler.num_windows))
    assert not empty.loss_weights.any()
    every = batches.make_examples(np.arange(batches.sampler.num_windows))
    assert (every.loss_weights > 0).any(1).all(), "each window of both sources is one"
    again = batches.make_examples(np.arange(8), np.arange(8) + 1000)
    assert not np.array_equal(again.loss_weights, every.loss_weights[:8]), "another epoch has other targets"


def test_an_example_has_a_window_of_its_own(tmp_path, finished_run):
    e = fine_tuning(tmp_path, finished_run, **PRIVATE | {"train.batch_size": 32})
    batches = build_train_setup(e, one_device()).batches
    assert batches.experiment.model.attention_kernel == "xla"
    (stream,) = batches.train_streams
    assert batches.sampler.num_windows == len(stream.ends) == stream.windows_per_epoch
    batch = batches.host_batch(0)
    assert batch.segment_ids is None or batch.segment_ids.max() <= 1


def test_draws_continue_after_a_change_of_the_mask(tmp_path):
    e = tiny_run(tmp_path, **PRIVATE | {"train.batch_size": 32})
    before = build_train_setup(e, one_device()).batches
    after = build_train_setup(e.override({"data.document_mask": True}), one_device()).batches
    after.seek(before.position(100))
    assert after.position(100).next_example == 0
    np.testing.assert_array_equal(after.example_ids(100), before.example_ids(100))
    assert not np.array_equal(after.example_ids(100), before.example_ids(0))


def test_every_window_is_drawn_by_itself_and_none_beyond_the_room(library, tmp_path):
    e = tiny_run(tmp_path, **PRIVATE | {"train.batch_size": 32})
    batches = build_train_setup(e, one_device()).batches
    draws, steps = batches.sampler, 3000
    drawn = np.array([batches.example_ids(step).ravel() for step in range(steps)])
    assert drawn.shape == (steps, 32) and drawn.max() <= draws.num_windows
    there = np.zeros((steps, draws.num_windows + 1), int)
    np.add.at(there, (np.arange(steps)[:, None], drawn), 1)
    there = there[:, :-1]
    assert there.max() == 1, "no window twice in a batch"
    counts = there.sum(0)
    expected = draws.sampling_rate * steps
    chi = ((counts - expected) ** 2 / (expected * (1 - draws.sampling_rate))).sum()
    assert 1e-3 < stats.chi2.sf(chi, draws.num_windows) < 1 - 1e-3
    sizes = there.sum(1)
    rate = draws.sampling_rate
    assert sizes.var() == pytest.approx(draws.num_windows * rate * (1 - rate), rel=0.15), "binomial"
    assert not np.array_equal(drawn[0], drawn[1])
    size = int(sizes[7])
    batch = batches.host_batch(7)
    assert ((batch.loss_weights[0].sum(1) > 0) == (np.arange(32) < size)).all(), "padding has no loss"
    plain = np.concatenate([w._cut(np.arange(w.windows_per_pass) * w.length).ids for w in batches.train_streams])
    np.testing.assert_array_equal(batch.tokens[0, :size], plain[drawn[7][:size], :-1])


@pytest.mark.slow
def test_epsilon_of_a_run(library):
    assert spent_by(PoissonSampler.of(20, 32), 2.0, 5)[0] == pytest.approx(
        spent(1.0, 2.0, 5, 0.1 / 20).epsilon, rel=1e-6
    )
    draws = PoissonSampler.of(2000, 64)
    epsilon, delta = spent_by(draws, 1.0, 300)
    assert delta == 0.1 / 2000
    roomy = spent(draws.sampling_rate, 1.0, 300, delta).epsilon
    assert roomy <= epsilon < 1.01 * roomy, "batches that overflow cost something, and seldom happen"


@pytest.mark.slow
@pytest.mark.usefixtures("single_device")
def test_a_private_run_reports_epsilon_and_resumes_bitwise(library, tmp_path, capfd):
    e = tiny_run(tmp_path, **PRIVATE | {"model.dropout": 0.1, "train.batch_size": 32})
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    result = train(e, whole)
    epsilon, delta = spent_by(build_train_setup(e, one_device()).batches.sampler, 1.0, 6)
    assert (result["epsilon"], result["delta"]) == (epsilon, delta)
    assert f"privacy  epsilon {epsilon:.3g} at delta {delta:.2g}, for each of" in capfd.readouterr().err
    shutil.copytree(whole, halved)
    train(e, halved, rollback_to=3)
    assert_same(restored(whole), restored(halved))
    with pytest.raises(RunError, match=r"so train\.batch_size cannot change; choose another --run-dir"):
        train(e.override({"train.batch_size": 64, "train.steps": 9}), halved, allow_changes=True)
    longer = train(e.override({"train.steps": 9}), halved, allow_changes=True)
    assert longer["epsilon"] > epsilon
    assert json.loads((halved / "result.json").read_text())["epsilon"] == longer["epsilon"]
    text = "\n".join(replay(open_run(whole), 5))
    assert "the run   logged" in text and "the same" in text


def test_what_cannot_be_private_is_refused_before_anything_runs():
    fields = {"optim.clip_norm": None, "train.spike_sigma": 6.0, "data.source": ("a", "b"), "data.weights": (1.0, 2.0)}
    with pytest.raises(ConfigError) as refused:
        check(Experiment().override({"optim.noise_multiplier": 1.0} | fields))
    for name in ("dpo", "grpo"):
        e = Experiment().override({"optim.noise_multiplier": 1.0, "objective.name": name})
        with pytest.raises(
            ConfigError, match=r"gradient for each window, and objective.name = .* reads several windows together"
        ):
            check(e)
    with pytest.raises(ConfigError, match=r"train\.batch_size = 8: .* choose 24 or more"):
        check(Experiment().override({"optim.noise_multiplier": 1.0, "train.batch_size": 8}))
    for field in ("optim.clip_norm", "train.spike_sigma", "data.weights"):
        assert field in str(refused.value)
    with pytest.raises(ConfigError, match=r"optim.noise_multiplier = 0.0: must be above 0"):
        check(Experiment().override({"optim.noise_multiplier": 0.0}))
