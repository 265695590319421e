"""Fine-tuning: the config and the weights of the initial model, and which of them are trainable."""

import dataclasses
import shutil
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, assert_same, fine_tuning, restored, tiny_model

from gptjax.config import Experiment, ModelConfig
from gptjax.data.tokenizer import ByteTokenizer
from gptjax.errors import ConfigError, Interrupted, RunError
from gptjax.inference.pretrained import Pretrained
from gptjax.model.gpt import GPT, init_params
from gptjax.model.weights import merge_lora
from gptjax.training import loop, train
from gptjax.training.diagnosis import replay
from gptjax.training.evaluation import evaluate_run
from gptjax.training.initial import inherit_config, init_mismatches, merge_params
from gptjax.training.optim import make_optimizer, trainable_mask
from gptjax.training.restore import load_params, open_trained
from gptjax.training.run import open_run
from gptjax.training.state import leaf_name


def names(tree) -> dict:
    return {leaf_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def test_the_shape_is_that_of_the_model_it_starts_from():
    theirs = tiny_model(positions="rope", ffn="swiglu", dropout=0.1, layers="unrolled", vocab_size=99)
    e = inherit_config(Experiment(init="x"), theirs)
    assert e.model.resolved() == dataclasses.replace(theirs, dropout=0.0, vocab_size=None)
    e = inherit_config(Experiment(init="x", model=ModelConfig(dropout=0.2, context_length=8, lora_rank=4)), theirs)
    assert (e.model.dropout, e.model.context_length, e.model.lora_rank, e.model.embed_dim) == (0.2, 8, 4, 16)
    assert e.model.resolved().rope_original_length == 8
    assert inherit_config(dataclasses.replace(e, model=e.model.resolved()), e.model.resolved()).model.resolved() == (
        e.model.resolved()
    ), "a resumed run inherits its own config"
    with pytest.raises(ConfigError) as caught:
        inherit_config(Experiment(init="x", model=ModelConfig(num_layers=7, ffn="relu")), theirs)
    assert "model.num_layers = 7: the model of init = 'x' has 2; leave it out" in str(caught.value)
    assert "model.ffn = relu" in str(caught.value), "all at once"


def test_weights_fit_where_they_can():
    theirs, ours = tiny_model(vocab_size=11), tiny_model(vocab_size=14, context_length=9, lora_rank=2)
    loaded, fresh = init_params(theirs, jax.random.key(0)), init_params(ours, jax.random.key(1))
    assert init_mismatches(loaded, fresh, ours) == []
    params = merge_params(loaded, fresh)
    np.testing.assert_array_equal(params["embedding"]["tokens"][:11], loaded["embedding"]["tokens"])
    np.testing.assert_array_equal(params["embedding"]["tokens"][11:], fresh["embedding"]["tokens"][11:])
    np.testing.assert_array_equal(params["embedding"]["positions"], loaded["embedding"]["positions"][:9])
    attention = params["blocks"]["attention"]
    np.testing.assert_array_equal(attention["query"], loaded["blocks"]["attention"]["query"])
    np.testing.assert_array_equal(
        attention["query_lora_down"], fresh["blocks"]["attention"]["query_lora_down"], "what they have not stays new"
    )
    tokens = jnp.arange(9)[None]
    before = GPT(theirs).apply({"params": loaded}, tokens)
    after = GPT(ours).apply({"params": params}, tokens)
    np.testing.assert_allclose(before, after[..., :11], atol=1e-6, err_msg="LoRA changes nothing at the start")
    smaller = init_params(tiny_model(vocab_size=7, context_length=20, ffn_dim=8), jax.random.key(0))
    assert [line.partition(":")[0] for line in init_mismatches(loaded, smaller, tiny_model())] == [
        "blocks.ffn.down", "blocks.ffn.up", "blocks.ffn.up_bias", "embedding.positions", "embedding.tokens",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_model_with_lora_is_the_merged_model():
    model = tiny_model(lora_rank=3, lora_alpha=5.0, lora_targets=("tokens", "query", "value", "out", "up", "down"))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(7), x.shape), init_params(
        model, jax.random.key(0)))  # fmt: skip
    plain, merged = merge_lora(model, params)
    assert plain.lora_rank == 0 and names(merged).keys() == names(init_params(plain, jax.random.key(0))).keys()
    attention, ours = params["blocks"]["attention"], merged["blocks"]["attention"]
    trainable = np.einsum(
        "lnhr,lre->lnhe", *(np.float64(attention[f"out_lora_{side}"]) for side in ("down", "up"))
    )  # of a matrix with two axes to sum over
    np.testing.assert_allclose(ours["out"], attention["out"] + 5 / 3 * trainable, rtol=1e-5, atol=1e-6)
    tokens = jnp.arange(11)[None]
    a, b = (GPT(m).apply({"params": p}, tokens) for m, p in ((model, params), (plain, merged)))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert float(abs(a).max()) > 0.1


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "sgd", "muon", "schedule_free"])
def test_what_is_frozen_has_no_moments_and_does_not_move(name):
    optim = dict(name=name, freeze=("embedding.*", "blocks.*bias"), schedule="constant")
    e = TINY.override(model=dict(vocab_size=11), optim=optim | ({"ema_decay": 0.5} if name == "adamw" else {}))
    e = e.resolved(11)
    params = init_params(e.model, jax.random.key(0))
    tx, trainable = make_optimizer(e), names(trainable_mask(e))
    state = tx.init(params)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    for path, update in names(updates).items():
        assert bool(trainable[path]) == bool(np.any(update)), path
        assert trainable[path] != (path.startswith("embedding") or ("blocks" in path and path.endswith("bias")))
    frozen = {names(params)[path].shape for path in trainable if not trainable[path]}
    kept = {names(params)[path].shape for path in trainable if trainable[path]}
    assert not {x.shape for x in jax.tree.leaves(state) if x.ndim} & (frozen - kept)


HEAD = {
    f"embedding.{name}"
    for name in ("head", "head_bias", "transform", "transform_bias", "transform_norm.scale", "transform_norm.bias")
}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("embedding.*", {"embedding.tokens", "embedding.positions"}),
        ("head.*", HEAD),
        ("*head_bias", {"embedding.head_bias"}),
        ("embedding.head*", {"embedding.head", "embedding.head_bias"}),  # the names in checkpoints
    ],
)
def test_patterns_treat_the_output_head_as_a_module_outside_the_embedding(pattern, expected):
    model = dict(vocab_size=11, tie_embeddings=False, head="mlm", causal=False)
    e = TINY.override(model=model, optim=dict(freeze=(pattern,))).resolved(11)
    assert {path for path, trains in names(trainable_mask(e)).items() if not trains} == expected


@pytest.mark.slow
def test_rates_fall_from_layer_to_layer():
    flat, steep = (
        TINY.override(model=dict(vocab_size=11, num_layers=3), optim=dict(layer_decay=d, weight_decay=0.0)).resolved(11)
        for d in (1.0, 0.5)
    )
    params = init_params(flat.model, jax.random.key(0))
    grads = jax.tree.map(jnp.ones_like, params)
    a, b = (names(tx.update(grads, tx.init(params), params)[0]) for tx in map(make_optimizer, (flat, steep)))
    for path in a:
        factor = np.array([0.25, 0.5, 1.0]) if path.startswith("blocks") else 0.125 if "embedding" in path else 1.0
        expected = a[path] * (np.reshape(factor, (-1, *[1] * (a[path].ndim - 1))) if np.ndim(factor) else factor)
        np.testing.assert_allclose(b[path], expected, rtol=1e-6, err_msg=path)


@pytest.fixture
def examples(tmp_path):
    """Overrides to fine-tune any model on a table with a rule."""
    data = fine_tuning(tmp_path, tmp_path).data
    return {f"data.{name}": getattr(data, name) for name in ("source", "prompt", "answer", "val_fraction")} | {
        "objective.name": "sft"
    }


@pytest.mark.slow
@pytest.mark.usefixtures("single_device")
def test_lora_trains_saves_resumes_and_is_merged_where_it_is_used(tmp_path, examples, finished_run, capfd):
    lora = {"init": str(finished_run), "data.tokenizer": "init", "model.lora_rank": 2, "train.steps": 8,
            "model.lora_targets": ("tokens", "query", "out", "up"), "optim.learning_rate": 3e-2}  # fmt: skip
    e = TINY.override(examples | lora)
    result = train.train(e, tmp_path / "whole")
    before, after = (names(load_params(open_run(folder), "last")[0]) for folder in (finished_run, tmp_path / "whole"))
    for path, x in before.items():
        np.testing.assert_array_equal(x, after[path], err_msg=f"{path} is frozen")
    assert all(np.any(after[path]) for path in after if path.endswith(("lora_up", "tokens_lora_down")))
    trainable, total = sum(x.size for path, x in after.items() if "_lora_" in path), sum(x.size for x in after.values())
    assert (result["num_trained"], result["num_params"]) == (trainable, total) == (1122, 1122 + total - trainable)
    assert f"{total:,} parameters ({trainable:,} trainable, {trainable / total:.2%})" in capfd.readouterr().err
    logged = next(line["grad_norm"] for line in open_run(tmp_path / "whole").metrics() if line["step"] == 3)
    again = replay(open_run(tmp_path / "whole"), 3)[0].rpartition("gradient norm ")[2]
    assert float(again) == pytest.approx(logged, rel=1e-4), "of the trainable weights alone"
    pretrained = open_trained(open_run(tmp_path / "whole"))
    assert pretrained.model.lora_rank == 0 and names(pretrained.params).keys() == before.keys()
    assert 0 < result["val_loss"] < 6

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "stop_requests", lambda: nullcontext(lambda step: "SIGTERM" if step == 4 else None))
        train.train(e, tmp_path / "in pieces")
    train.train(e, tmp_path / "in pieces")
    assert_same(restored(tmp_path / "whole"), restored(tmp_path / "in pieces"))


@pytest.mark.slow
@pytest.mark.usefixtures("single_device")
def test_a_run_resumes_when_its_initial_model_is_gone(tmp_path, examples, finished_run):
    shutil.copytree(finished_run, tmp_path / "first")
    e = TINY.override(examples | {"init": str(tmp_path / "first"), "data.tokenizer": "init"})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "stop_requests", lambda: nullcontext(lambda step: "SIGTERM" if step == 4 else None))
        train.train(e, tmp_path / "run")
    shutil.rmtree(tmp_path / "first")
    assert train.train(e, tmp_path / "run")["steps"] == 6
    assert evaluate_run(open_run(tmp_path / "run"))["val_loss"] > 0
    with pytest.raises(RunError, match="first: does not exist"):
        train.train(e, tmp_path / "another")


@pytest.mark.slow
@pytest.mark.usefixtures("single_device")
def test_any_model_can_be_what_it_starts_from(tmp_path, examples):
    model = tiny_model(vocab_size=300, positions="rope", context_length=32, dtype="bfloat16")  # rows beyond the ids
    theirs = Pretrained(
        "theirs", model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(model, jax.random.key(5))),
        ByteTokenizer(), {"temperature": 0.5}, (7,), "{{ messages }}",
    )  # fmt: skip
    e = Experiment(init="hub/name").override(
        examples
        | {"data.tokenizer": "init", "train.steps": 1, "train.batch_size": 2, "train.sample_tokens": 0}
        | {"optim.warmup_steps": 0, "optim.learning_rate": 1e-30}
    )
    train.train(e, tmp_path / "run", open_init=lambda name: {"hub/name": theirs}[name])
    ours = open_trained(open_run(tmp_path / "run"))
    assert ours.model == dataclasses.replace(model, dropout=0.0)
    assert ours.generation_settings() == theirs.generation_settings(), "how to sample from it is passed on"
    for path, x in names(theirs.params).items():
        np.testing.assert_allclose(np.float32(x), names(ours.params)[path], rtol=0, atol=1e-28)
