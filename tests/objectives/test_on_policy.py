"""What the model learns from its own answers, against sums over all answers that there are."""

import dataclasses
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, assert_same, restored, tiny_model

from gptjax import sharding
from gptjax.config import Experiment
from gptjax.data.batches import Batch
from gptjax.data.tokenizer import ByteTokenizer, CharTokenizer
from gptjax.errors import ConfigError, GptjaxError, Interrupted, PromptError, RunError
from gptjax.inference.pretrained import Pretrained
from gptjax.model.gpt import GPT, init_params
from gptjax.objectives.grpo import group_advantages
from gptjax.objectives.losses import batch_loss, token_nll
from gptjax.objectives.on_policy import Rollout, sampled_batch
from gptjax.objectives.rewards import make_reward
from gptjax.objectives.rloo import leave_one_out_advantages
from gptjax.training import loop, train
from gptjax.training.evaluation import evaluate_run
from gptjax.training.preflight import check_start
from gptjax.training.run import open_run
from gptjax.training.summary import summary
from gptjax.training.train_setup import build_train_setup, first_state

MODEL = tiny_model(vocab_size=4, context_length=6)
LETTERS, END, MOST = CharTokenizer("abc", has_eos=True), 3, 2
PROMPT = np.array([1, 0], np.int32)
# all answers of at most two tokens: those that end, and those that are broken off
ANSWERS = [np.array(y, np.int32) for y in [(END,), *((x, y) for x in range(3) for y in range(4))]]


def models():
    return (jax.tree.map(lambda x: 8 * x, init_params(MODEL, jax.random.key(i))) for i in (0, 1))


def all_answers() -> Batch:
    return sampled_batch([PROMPT] * len(ANSWERS), ANSWERS, 6)


def log_probabilities(params):
    batch = all_answers()
    return -(token_nll(params, batch, GPT(MODEL), {})[0] * batch.loss_weights).sum(-1)


def gradient_of(batch: Batch, params):
    return jax.grad(lambda p: batch_loss(p, batch, GPT(MODEL), 0.0, {})[0])(params)


def assert_close(a, b):
    scale = max(float(abs(x).max()) for x in jax.tree.leaves(b))
    assert scale > 1e-2
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * scale), a, b)


def test_all_answers_are_all():
    ours, _ = models()
    chances = np.exp(log_probabilities(ours))
    assert chances.sum() == pytest.approx(1, abs=1e-5) and chances.max() < 0.9


def test_the_expected_update_of_risk_is_the_gradient_of_the_expected_score():
    """Over all pairs of answers, each as often as the model writes it; the score less beta times the divergence."""
    (ours, theirs), beta = models(), 0.3
    scores, chances = np.random.default_rng(0).normal(size=len(ANSWERS)), np.exp(log_probabilities(ours))
    batch = all_answers()
    nats = [np.asarray(token_nll(p, batch, GPT(MODEL), {})[0], np.float64) for p in (ours, theirs)]
    moved = (nats[1] - nats[0]) * batch.loss_weights
    advantages = np.zeros(batch.loss_weights.shape)
    for pair in itertools.product(range(len(ANSWERS)), repeat=2):
        of_pair = leave_one_out_advantages(scores[None, pair], moved[[*pair]], batch.loss_weights[[*pair]], beta)
        for i, own in zip(pair, of_pair, strict=True):
            advantages[i] += chances[pair[0]] * chances[pair[1]] * own / 2

    def cost(params):
        ln = log_probabilities(params)
        return -(jnp.exp(ln) * (scores - beta * (ln - log_probabilities(theirs)))).sum()

    assert_close(gradient_of(batch._replace(advantages=advantages), ours), jax.grad(cost)(ours))


def test_the_update_of_grpo_is_that_of_the_papers_objective():
    """The clipped objective at the model that wrote the answers, where nothing is clipped, by automatic derivatives."""
    (ours, theirs), beta = models(), 0.3
    group = [0, 3, 3, 7, 12]
    batch = sampled_batch([PROMPT] * 5, [ANSWERS[i] for i in group], 6)
    scores = np.random.default_rng(1).normal(size=(1, 5))
    nats = [np.asarray(token_nll(p, batch, GPT(MODEL), {})[0], np.float64) for p in (ours, theirs)]
    advantages = group_advantages(scores, (nats[1] - nats[0]) * batch.loss_weights, batch.loss_weights, beta)
    relative = ((scores - scores.mean()) / (scores.std(ddof=1) + 1e-4))[0]

    def cost(params):
        ln, before, reference = (-token_nll(p, batch, GPT(MODEL), {})[0] for p in (params, ours, theirs))
        ratio, r = jnp.exp(ln - jax.lax.stop_gradient(before)), jnp.exp(reference - ln)
        each = jnp.minimum(ratio * relative[:, None], jnp.clip(ratio, 0.8, 1.2) * relative[:, None])
        each = (each - beta * (r - jnp.log(r) - 1)) * batch.loss_weights
        return -(each.sum(-1) / batch.loss_weights.sum(-1)).sum()

    assert_close(gradient_of(batch._replace(advantages=advantages), ours), jax.grad(cost)(ours))


def test_prompts_are_cut_to_the_context_and_samples_repeat_by_key():
    e = TINY.override({"objective.name": "rloo", "objective.max_new_tokens": MOST}).override(
        model=dict(vocab_size=4, context_length=6)
    )
    rollout = Rollout(e.resolved(4), LETTERS, None, sharding.mesh_of(jax.devices()[:1], 1, 1), leave_one_out_advantages)
    ids = np.array([[0, 1, 2, 1, END, 0, 0], [2, 2, 0, 2, 1, 0, END], [0] * 7], np.int32)
    weights = np.array([[0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1], [0] * 6], np.float32)  # the second with two answers
    asked = rollout.prompts(Batch(ids[:, :-1], ids[:, 1:], weights))
    assert [(q.prompt.tolist(), q.answer) for q in asked] == [([0, 1, 2], "b"), ([2, 0, 2, 1], "a")]  # 6 - 2 tokens
    params, _ = models()
    made = rollout.sample(params, asked * 300, (0, 6, 1))
    again = rollout.sample(params, asked * 300, (0, 6, 1))
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(made, again, strict=True))
    assert len({a.text for a in made}) > 3, "answers are drawn"
    batch = sampled_batch([q.prompt for q in asked], [np.array([1, END]), np.array([2])], 6)
    assert batch.tokens[0].tolist() == [0, 1, 2, 1, 0, 0] and batch.targets[0].tolist() == [1, 2, 1, END, 0, 0]
    assert batch.loss_weights.tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0]]


def test_scores_are_metrics_with_more_for_better_or_functions():
    columns = (["p", "p"], ["right", "wring"], ["right", "wrong"])
    assert make_reward("exact_match")(*columns).tolist() == [1, 0]
    assert make_reward("edit_distance")(*columns).tolist() == [0, -0.2]
    assert make_reward("test_on_policy:likes_e")(["p"], ["eve"], ["x"]).tolist() == [2 / 3]
    with pytest.raises(
        ConfigError, match=r"objective.reward = 'exactmatch': must be one of accuracy, .*module:function"
    ):
        make_reward("exactmatch")
    assert make_reward("bleu")(["p"], ["yes it is"], ["yes it is"])[0] == pytest.approx(100), "without n-grams of four"
    with pytest.raises(ConfigError, match="cannot be imported"):
        make_reward("nowhere:nothing")
    with pytest.raises(ConfigError, match="must be a function of"):
        make_reward("math:pi")
    with pytest.raises(GptjaxError, match=r"returned None for the answer 'eve'; it must return a finite number"):
        make_reward("test_on_policy:forgets")(["p"], ["eve"], ["x"])


def likes_e(prompt: str, text: str, answer: str) -> float:
    """The share of e in what was written."""
    return text.count("e") / max(len(text), 1)


def forgets(prompt: str, text: str, answer: str) -> None:
    """Scores nothing."""


@pytest.fixture
def questions(tmp_path):
    rows = [f'{{"q": "line {i}", "a": "is {i * i % 97}"}}' for i in range(100)]
    (tmp_path / "table.jsonl").write_text("\n".join(rows) + "\n")
    return {"data.source": str(tmp_path / "table.jsonl"), "data.prompt": "{q} ", "data.answer": "{a}",
            "data.tokenizer": "init", "objective.num_generations": 4, "objective.max_new_tokens": 6,
            "objective.reward": "test_on_policy:likes_e", "data.val_fraction": 0.2, "train.sample_tokens": 0,
            "train.batch_size": 16}  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("single_device")
@pytest.mark.parametrize("name", ["grpo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_a_run_earns_more_reward_and_resumes_bitwise(tmp_path, finished_run, questions, name):
    e = TINY.override(questions | {"init": str(finished_run), "objective.name": name, "train.steps": 80,
                                   "train.checkpoint_every": 10, "optim.learning_rate": 2e-2, "train.eval_every": 0,
                                   "objective.beta": 0.01})  # fmt: skip
    figures = train.train(e, tmp_path / "whole")
    lines = [line for line in open_run(tmp_path / "whole").metrics() if "score" in line]
    assert lines[0]["kl"] == 0 and lines[-1]["kl"] > 0 and 1 <= lines[0]["answer_tokens"] <= 6
    assert figures["val_score"] > 4 * lines[0]["score"] and figures["val_score"] > 0.4
    assert figures["val_loss"] == -figures["val_score"] and "val_bits_per_byte" not in figures
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "stop_requests", lambda: loop.contextlib.nullcontext(lambda step: step == 17 and "SIGTERM"))
        train.train(e, tmp_path / "in pieces")
    train.train(e, tmp_path / "in pieces")
    assert_same(restored(tmp_path / "whole"), restored(tmp_path / "in pieces"))
    with pytest.raises(RunError, match="names code, which is imported for an experiment file only"):
        evaluate_run(open_run(tmp_path / "whole"))


TUNED = {
    "rloo": {},
    "dpo": {"data.rejected": "{q}", "objective.num_generations": 8, "objective.max_new_tokens": 32},
    "distill": {"objective.reference": "INIT", "objective.num_generations": 8, "objective.max_new_tokens": 32},
}


def tuned(name, questions, init) -> Experiment:
    """The answers learnt by an objective that looks beyond the next token."""
    changes = questions | TUNED[name] | {"init": str(init), "objective.name": name}
    if name != "rloo":
        changes["objective.reward"] = "exact_match"  # the default: it has no meaning here
    changes = {path: str(init) if value == "INIT" else value for path, value in changes.items()}
    return TINY.override(changes | {"train.microbatches": 2, "model.lora_rank": 2})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rloo", "distill"))])
def test_every_mesh_learns_the_same(monkeypatch, finished_run, questions, name):
    e = tuned(name, questions, finished_run)
    seen = []
    meshes = [sharding.mesh_of(jax.devices()[: data * model], data, model) for data, model in [(1, 1), (8, 1), (2, 2)]]
    monkeypatch.setattr(sharding, "_cores_are_devices", lambda: True)  # 8 rows a microbatch
    cores = build_train_setup(e).mesh
    assert cores.shape[sharding.CORES] == {"dpo": 4, "rloo": 2, "distill": 8}[name]
    for mesh in [*meshes, cores]:
        setup = build_train_setup(e, mesh)
        with jax.set_mesh(setup.mesh):
            state = first_state(setup, None)
            for step in range(2):
                batch, figures = setup.batch(state, step)
                state, metrics = setup.train_step(state, batch)
        seen.append([float(metrics["loss"]), *figures.values(), *np.asarray(batch.tokens).ravel().tolist()])
    for other in seen[1:]:  # what the model has moved by is a difference of sums of 30 nats
        np.testing.assert_allclose(other, seen[0], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("single_device")
@pytest.mark.parametrize("name", ["dpo", "distill"])
def test_a_run_with_a_reference_model_resumes_bitwise_and_refuses_another_reference(
    tmp_path, finished_run, questions, name
):
    shutil.copytree(finished_run, tmp_path / "other")
    e = tuned(name, questions, tmp_path / "other")
    train.train(e, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "stop_requests", lambda: loop.contextlib.nullcontext(lambda step: step == 4 and "SIGTERM"))
        train.train(e, tmp_path / "in pieces")
    shutil.copytree(tmp_path / "in pieces", tmp_path / "beside another")
    train.train(e, tmp_path / "in pieces")
    assert_same(restored(tmp_path / "whole"), restored(tmp_path / "in pieces"))
    run = open_run(tmp_path / "whole")
    assert evaluate_run(run)["val_loss"] == pytest.approx(run.result()["val_loss"], rel=1e-5)

    other = TINY.override({"train.steps": 1, "optim.warmup_steps": 0, "data.source": questions["data.source"],
                           "data.column": "a", "train.sample_tokens": 0})  # fmt: skip
    shutil.rmtree(tmp_path / "other")
    train.train(other, tmp_path / "other")
    with pytest.raises(RunError, match=r"weights of the reference model \(SHA-256\): '\w+' in the run, '\w+' now"):
        train.train(e, tmp_path / "beside another")
    shutil.rmtree(tmp_path / "other")
    assert train.train(e, tmp_path / "whole")["steps"] == 6, "a finished run needs no other"


def test_unsuitable_reference_models_are_refused(tmp_path, questions):
    e = tuned("distill", questions, "teacher")
    good = Pretrained("teacher", tiny_model(vocab_size=257, context_length=16), None, ByteTokenizer())

    def refused(changes, message, **others):
        worse = dataclasses.replace(good, model=dataclasses.replace(good.model, **changes), **others)
        experiment = e.override({"init": None, "model.lora_rank": 0, "model.context_length": 16})
        setup = build_train_setup(experiment, sharding.mesh_of(jax.devices()[:1], 1, 1), open_init=lambda name: worse)
        with pytest.raises((RunError, PromptError), match=message):
            check_start(setup)

    refused({"context_length": 8}, "has 8 learned positions, but model.context_length = 16")
    refused({"causal": False}, "has model.causal = False")
    refused({"num_classes": 2}, "is a classifier", labels=("a", "b"))


def test_pairs_that_are_too_long_are_read_after_the_same_prompt(tmp_path, questions):
    row = '{"q": "a very long question", "a": "yes", "b": "no, never"}\n'
    (tmp_path / "long.jsonl").write_text(row * 40)
    source = str(tmp_path / "long.jsonl")
    e = tuned("dpo", questions | {"data.source": source, "data.val_source": source}, "none").override(
        {"init": None, "objective.reference": "x", "data.rejected": "{b}", "data.tokenizer": "byte"}
        | {"model.lora_rank": 0}
    )
    setup = build_train_setup(e, sharding.mesh_of(jax.devices()[:1], 1, 1))
    batch = setup.batches.make_examples(np.arange(4))
    prompts = [bytes(t[: int(w.argmax()) + 1].tolist()) for t, w in zip(batch.tokens, batch.loss_weights, strict=True)]
    assert len(set(prompts)) == 1 and b"very long question ".endswith(prompts[0]) and len(prompts[0]) == 7
    assert "80 prompts are longer than the context" in summary(setup, 0)
