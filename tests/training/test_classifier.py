"""A classifier is trained by the same loop: it learns, keeps packed examples apart, resumes, and shards."""

import json
import shutil
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, assert_same, restored, tiny_model

from gptjax import sharding
from gptjax.data.batches import Batch, positions_within
from gptjax.data.tokenizer import ByteTokenizer
from gptjax.errors import ConfigError, DataError, Interrupted, PromptError, RunError
from gptjax.inference.generator import Generator
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.scoring import Scorer
from gptjax.interop.saving import save_folder
from gptjax.model.gpt import GPT, init_params
from gptjax.objectives.losses import batch_loss
from gptjax.sharding import one_device
from gptjax.training import checkpoint, loop, train
from gptjax.training.evaluation import evaluate_run
from gptjax.training.initial import backbone_params, init_mismatches, merge_params
from gptjax.training.optim import make_optimizer, trainable_mask
from gptjax.training.preflight import check_start
from gptjax.training.restore import open_trained, restore_state
from gptjax.training.run import open_run
from gptjax.training.state import create_state, leaf_name
from gptjax.training.train_setup import build_train_setup, first_state

LABELS = ("first", "second", "third")


def names(tree) -> dict:
    return {leaf_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


@pytest.fixture
def letters(tmp_path):
    """A table with a rule to learn: the label is decided by the letter before the number."""
    rows = [{"letter": chr(97 + i % 9), "number": i % 100, "label": LABELS[i % 9 // 3]} for i in range(300)]
    (tmp_path / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TINY.override({
        "data.source": str(tmp_path / "letters.jsonl"), "data.prompt": "{letter}{number}", "data.answer": "{label}",
        "data.labels": LABELS, "data.answers": "classes", "data.val_fraction": 0.2, "objective.name": "sft",
        "train.sample_tokens": 0,
    })  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("single_device")
@pytest.mark.parametrize("causal", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_classifier_learns_a_rule_and_its_metrics_are_right(tmp_path, letters, causal, capsys):
    more = {"model.causal": causal, "train.steps": 60, "train.eval_every": 20, "train.checkpoint_every": 0}
    result = train.train(letters.override(more), tmp_path / "run")
    assert result["val_accuracy"] == 1.0 and result["val_loss"] < 0.3
    assert "val_bits_per_byte" not in result and "val_bytes" not in result
    assert "3 classes" in capsys.readouterr().err
    run = open_run(tmp_path / "run")
    assert run.experiment.model.num_classes == 3 and run.experiment.data.labels == LABELS
    lines = [line for line in run.metrics() if "val_loss" in line]
    assert lines[-1]["val_accuracy"] == 1.0 > lines[0]["val_accuracy"] - 1e-9
    again = evaluate_run(run)
    assert (again["val_accuracy"], again["val_answers"]) == (1.0, result["val_answers"])
    assert train.train(letters.override(more), tmp_path / "run") == run.result(), "finished"
    pretrained = open_trained(run)
    assert pretrained.labels == LABELS
    logits = GPT(pretrained.model).apply({"params": pretrained.params}, jnp.array([[*b"h55"]]))
    assert logits[0, -1].argmax() == 2


@pytest.mark.slow
@pytest.mark.usefixtures("single_device")
def test_the_accuracy_is_the_mean_over_all_targets(tmp_path, letters):
    e = letters.override({"train.steps": 2, "optim.warmup_steps": 0, "train.microbatches": 2})
    result = train.train(e, tmp_path / "run")
    run = open_run(tmp_path / "run")
    setup, model = build_train_setup(run.experiment), open_trained(run)
    correct, nll, num_targets = 0.0, 0.0, 0.0
    for batch in setup.batches.validation():
        logits = np.float64(GPT(model.model).apply({"params": model.params}, batch.tokens, batch.positions,
                                                   batch.segment_ids))  # fmt: skip
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        of_target = np.take_along_axis(logs, batch.targets[..., None], -1)[..., 0]
        nll -= (of_target * batch.loss_weights).sum()
        correct += ((logits.argmax(-1) == batch.targets) * batch.loss_weights).sum()
        num_targets += batch.loss_weights.sum()
    assert result["val_accuracy"] == correct / num_targets and 0 < result["val_accuracy"] < 1
    assert result["val_loss"] == pytest.approx(nll / num_targets, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"causal": False}, {"positions": "alibi", "causal": False}])
def test_examples_of_one_window_do_not_touch_each_other(changes):
    """Loss and gradient of a window are the sums of those of its examples alone, whatever its neighbours are."""
    model = tiny_model(num_classes=3, **changes)
    params = jax.tree.map(lambda x: 5 * x, init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    segments = np.array([[1] * 5 + [2] * 4 + [3] * 6 + [0]], np.int32)
    tokens = rng.integers(0, 11, segments.shape).astype(np.int32)
    targets = rng.integers(0, 3, segments.shape).astype(np.int32)
    weights = (segments > 0) * rng.integers(0, 2, segments.shape).astype(np.float32)
    weights[0, [4, 8, 14]] = 1

    @jax.jit
    def look(batch):
        return jax.value_and_grad(lambda p: batch_loss(p, batch, GPT(model), 0.0, {})[0])(params)

    def alone(number):
        here = segments[0] == number
        row = [np.zeros_like(x) for x in (tokens, targets, weights, segments)]
        for x, y in zip(row, (tokens, targets, weights, segments), strict=True):
            x[0, : here.sum()] = y[0, here]
        return look(Batch(*row[:3], row[3], positions_within(row[3])))

    loss, gradient = look(Batch(tokens, targets, weights, segments, positions_within(segments)))
    parts = [alone(number) for number in (1, 2, 3)]
    np.testing.assert_allclose(loss, sum(part for part, _ in parts), rtol=1e-5)
    for whole, *each in zip(*map(jax.tree.leaves, (gradient, *(g for _, g in parts))), strict=True):
        np.testing.assert_allclose(whole, sum(each), atol=4e-6 * max(1.0, abs(whole).max()))  # rounding of float32
    only_first = Batch(tokens, targets, weights * (segments == 1), segments, positions_within(segments))
    other = rng.integers(0, 11, segments.shape).astype(np.int32)
    changed = only_first._replace(tokens=np.where(segments == 1, tokens, other))
    kept, moved = look(only_first)[0], look(changed)[0]
    assert kept == moved, "the same bits with other neighbours"


MASKED = tiny_model(vocab_size=258, causal=False, head="mlm", embedding_norm=True)  # with a row for <mask>
FREE = tiny_model(vocab_size=257, tie_embeddings=False)  # with a head for tokens of its own


def of_tokens(model) -> Pretrained:
    return Pretrained("theirs", model, init_params(model, jax.random.key(5)), ByteTokenizer())


@pytest.mark.slow
@pytest.mark.parametrize("model", [MASKED, FREE], ids=["masked", "free"])
def test_the_body_of_any_model_gets_a_new_head(letters, model):
    first = of_tokens(model)
    e = letters.override({"init": "theirs", "data.tokenizer": "init"})
    setup = build_train_setup(e, one_device(), open_init=lambda name: first)
    check_start(setup)
    assert (setup.experiment.model.causal, setup.experiment.model.num_classes) == (model.causal, 3)
    ours, theirs = names(first_state(setup, None).params), names(first.params)
    assert ours.keys() - theirs.keys() == {"classifier.weight", "classifier.bias"}
    left_out = {n for n in theirs if n.startswith(("embedding.head", "embedding.transform"))}
    assert theirs.keys() - ours.keys() == left_out != set()
    for path in theirs.keys() & ours.keys():
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    assert 0.01 < ours["classifier.weight"].std() < 0.04 and not ours["classifier.bias"].any()


@pytest.mark.slow
@pytest.mark.usefixtures("single_device")
def test_a_run_from_a_masked_model_resumes_bit_for_bit(tmp_path, letters):
    e = letters.override({"init": "theirs", "data.tokenizer": "init", "model.dropout": 0.1, "train.steps": 4})
    go = partial(train.train, e, open_init=lambda name: of_tokens(MASKED))
    go(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "stop_requests", lambda: nullcontext(lambda step: "SIGTERM" if step == 3 else None))
        go(tmp_path / "in pieces")
    go(tmp_path / "in pieces")
    whole, pieces = (stored(tmp_path / name) for name in ("whole", "in pieces"))
    assert_same(whole, pieces)


def stored(folder) -> dict:
    """Everything in the last checkpoint of a run whose `init` is not there to be opened."""
    run = open_run(folder)
    setup = build_train_setup(run.experiment, one_device(), run=run)
    return names(restore_state(checkpoint.choose(run.checkpoints, "last"), setup.abstract, setup.experiment))


@pytest.mark.slow
@pytest.mark.usefixtures("single_device")
def test_lora_trains_the_head_too_and_frozen_patterns_hold(tmp_path, letters, finished_run):
    begun = {"init": str(finished_run), "data.tokenizer": "init", "train.steps": 3, "optim.warmup_steps": 0}
    before = names(open_trained(open_run(finished_run)).params)
    for changes in ({"model.lora_rank": 2}, {"optim.freeze": ("embedding.*", "blocks.*", "final_norm.*")}):
        folder = tmp_path / next(iter(changes))
        train.train(letters.override(begun | changes), folder)
        run = open_run(folder)
        after = {n.removeprefix("params."): x for n, x in restored(folder).items() if n.startswith("params.")}
        for path, x in before.items():
            np.testing.assert_array_equal(x, after[path], err_msg=f"{path} is frozen")
        assert np.all(after["classifier.bias"] != 0)
        trainable = {path for path, moves in names(trainable_mask(run.experiment)).items() if moves}
        assert {"classifier.weight", "classifier.bias"} == {path for path in trainable if "_lora_" not in path}
        merged = open_trained(run)
        assert merged.model.lora_rank == 0 and names(merged.params).keys() == before.keys() | {
            "classifier.weight", "classifier.bias"}  # fmt: skip


def test_the_head_has_the_full_rate():
    e = TINY.override(model=dict(num_classes=3), optim=dict(layer_decay=0.5, weight_decay=0.0))
    e = e.override({"data.answers": "classes"}).resolved(11)
    params = init_params(e.model, jax.random.key(0))
    ones = jax.tree.map(jnp.ones_like, params)
    updates, flat = (
        names(jax.jit(lambda tx=tx: tx.update(ones, tx.init(params), params)[0])())
        for tx in map(make_optimizer, (e, e.override({"optim.layer_decay": 1.0})))
    )
    np.testing.assert_array_equal(updates["classifier.weight"], flat["classifier.weight"])
    np.testing.assert_allclose(updates["embedding.tokens"], flat["embedding.tokens"] / 4, rtol=1e-6)


@pytest.mark.slow
def test_a_mesh_of_eight_gives_the_same_losses(letters):
    def losses(data, model):
        mesh = sharding.mesh_of(jax.devices()[: data * model], data, model)
        setup = build_train_setup(letters.override({"train.batch_size": 8}), mesh)
        with jax.set_mesh(mesh):
            state, found = create_state(setup.experiment, setup.tx, setup.abstract), []
            for step in range(2):
                state, metrics = setup.train_step(state, setup.batches.device_batch(step, mesh))
                found.append(float(metrics["loss"]))
            batch = sharding.shard_from_host(next(setup.batches.validation()), ("batch", "length"), mesh)
            found += map(float, jax.tree.leaves(setup.eval_step(state, batch)))
        if data > 1:
            assert state.params["classifier"]["weight"].sharding.spec == jax.P("data", None)
        return found

    np.testing.assert_allclose(losses(4, 2), losses(1, 1), atol=1e-4)


def model_of(labels=LABELS, **changes) -> Pretrained:
    model = tiny_model(vocab_size=257, num_classes=len(labels), **changes)
    return Pretrained("ours", model, init_params(model, jax.random.key(1)), ByteTokenizer(), labels=labels)


def test_a_head_stays_where_the_labels_do(letters):
    theirs = model_of()
    ours = init_params(theirs.model, jax.random.key(0))
    for labels, kept in [(LABELS, True), (LABELS[::-1], False)]:
        e = letters.override({"data.labels": labels})
        params = names(merge_params(backbone_params(theirs, e), ours))
        head = "classifier.weight"
        np.testing.assert_array_equal(params[head], names(theirs.params if kept else ours)[head])
        assert init_mismatches(backbone_params(theirs, e), ours, theirs.model) == []
    two = letters.override({"data.labels": LABELS[:2]})
    small = init_params(model_of(LABELS[:2]).model, jax.random.key(0))
    assert init_mismatches(backbone_params(theirs, two), small, model_of(LABELS[:2]).model) == []
    text = letters.override({"data.answers": "text"})
    tokens = tiny_model(vocab_size=257)
    fresh = init_params(tokens, jax.random.key(0))
    assert init_mismatches(backbone_params(theirs, text), fresh, tokens) == [], "it may predict tokens again"
    assert names(merge_params(backbone_params(theirs, text), fresh)).keys() == names(fresh).keys()


def test_what_needs_tokens_refuses_a_model_of_classes(tmp_path):
    message = r"ours: is a classifier \(first, second, third\).* gptjax eval"
    for refuses in (Generator, Scorer, lambda model: save_folder(model, tmp_path / "out")):
        with pytest.raises(PromptError, match=message):
            refuses(model_of())
    assert not (tmp_path / "out").exists()


def test_the_tasks_of_lm_eval_refuse_a_model_of_classes():
    pytest.importorskip("lm_eval")
    from gptjax.interop.harness import GptjaxLM

    with pytest.raises(PromptError, match="is a classifier"):
        GptjaxLM(model_of())


@pytest.mark.usefixtures("single_device")
def test_what_cannot_be_is_refused_before_training(tmp_path, letters, finished_run):
    with pytest.raises(ConfigError, match=r"model.num_classes = 5: there are 3 labels; leave it out"):
        train.train(letters.override({"model.num_classes": 5}), tmp_path / "run")
    e = letters.override({"init": str(finished_run), "data.labels": LABELS[:2], "data.tokenizer": "init"})
    with pytest.raises(
        DataError, match=r"line 7: the answer 'third' is none of the labels; the labels are first, second"
    ):
        train.train(e, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("single_device")
def test_labels_that_were_lost_are_noticed(tmp_path, letters):
    train.train(letters.override({"train.steps": 1, "optim.warmup_steps": 0}), tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    path = tmp_path / "damaged" / "experiment.json"
    values = json.loads(path.read_text())
    values["data"]["labels"] = ["first", "second"]
    path.write_text(json.dumps(values))
    with pytest.raises(RunError, match=r"is damaged \(model.num_classes = 3, but data.labels has 2\)"):
        open_trained(open_run(tmp_path / "damaged"))
