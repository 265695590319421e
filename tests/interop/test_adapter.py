"""LoRA in PEFT's format: the same logits in peft, only the LoRA matrices, there and back, and refused adapters."""

import dataclasses
import json
import random
import re
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY
from test_huggingface import CASES, TEXT, drawn, edit, made, named, with_tokenizer

from gptjax.commands.exchange import export, import_
from gptjax.errors import Disagreement, ExchangeError, GptjaxError
from gptjax.inference.pretrained import Pretrained
from gptjax.interop.adapter import WEIGHTS, save_adapter
from gptjax.interop.huggingface import load_folder, read_config
from gptjax.interop.layout import nested
from gptjax.interop.logit_check import compare_logits, logits
from gptjax.interop.open import open_model
from gptjax.interop.saving import choose_family, save_folder
from gptjax.model.gpt import init_params
from gptjax.model.weights import merge_lora
from gptjax.training import train
from gptjax.training.state import leaf_name

TARGETS = ("tokens", "query", "key", "value", "out", "up", "down", "gate")


@pytest.fixture
def peft():
    pytest.importorskip("transformers").utils.logging.disable_progress_bar()
    return pytest.importorskip("peft")


def adapted(base: Pretrained, seed: int) -> Pretrained:
    """The model with random LoRA matrices for some of its weights."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    there = TARGETS[: 7 + base.model.gated]
    targets = ("query", "value") if seed == 0 else tuple(draw.sample(there, draw.randint(1, len(there))))
    lora = dict(lora_rank=draw.randint(1, 4), lora_alpha=draw.choice([1.0, 3.5, 16.0]), lora_targets=targets)
    model = dataclasses.replace(base.model, **lora)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    shapes = {leaf_name(path): x.shape for path, x in jax.tree.leaves_with_path(shapes)}
    small = {n: rng.normal(0, 0.2, shape).astype(np.float32) for n, shape in shapes.items() if "_lora_" in n}
    return dataclasses.replace(base, model=model, params=nested(named(base.params) | small))


def merged(ours: Pretrained) -> Pretrained:
    """The model with its LoRA weights merged."""
    model, params = merge_lora(ours.model, ours.params)
    return dataclasses.replace(ours, model=model, params=params)


def stored(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_peft_has_the_logits_of_a_run_with_lora_and_its_merge_is_ours(tmp_path, peft, family, changes, seed):
    base, adapter, whole = tmp_path / "base", tmp_path / "adapter", tmp_path / "whole"
    save_folder(made(changes), base)
    ours = adapted(made(changes), seed)
    save_adapter(ours, adapter, str(base), base)
    found = compare_logits(ours, base, adapter)
    assert found.difference < 1e-4 and found.reference == "peft"
    assert choose_family(merged(ours).model).name == family
    save_folder(merged(ours), whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on_base, plain = (architecture(base).from_pretrained(folder) for folder in (base, whole))
        untie(on_base)
        theirs = peft.PeftModel.from_pretrained(on_base, str(adapter)).merge_and_unload().state_dict()
    for name, x in plain.state_dict().items():
        np.testing.assert_allclose(theirs[name].numpy(), x.numpy(), rtol=0, atol=2e-6, err_msg=name)


def untie(model) -> None:
    """PEFT requires this before merging: otherwise the LoRA weights of a tied embedding are added twice."""
    head = model.get_output_embeddings()
    head.weight = type(head.weight)(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def architecture(folder: Path):
    import transformers

    return getattr(transformers, read_config(folder)[0].architecture)


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_an_adapter_holds_the_small_matrices_alone_and_comes_back(tmp_path, family, changes):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_folder(made(changes), base)
    ours = adapted(made(changes), 2)
    save_adapter(ours, adapter, str(base), base)
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors, rank = stored(adapter / WEIGHTS), ours.model.lora_rank
    assert all(re.search(r"\.lora_(A\.weight|B\.weight|embedding_A|embedding_B)$", name) for name in tensors)
    small = {name: x for name, x in named(ours.params).items() if "_lora_" in name}
    times = {name: 1 + (ours.model.tie_embeddings and "tokens" in name) for name in small}  # the head has them as well
    assert sum(np.count_nonzero(x) for x in tensors.values()) == sum(times[name] * x.size for name, x in small.items())
    assert all(min(x.shape) <= 3 * rank for x in tensors.values())
    back = open_model(str(adapter))
    got, wanted = (logits(x.model, x.params, TEXT) for x in (back, ours))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)
    for name, x in named(ours.params).items():
        if "_lora_" not in name and name.rpartition(".")[2] not in ours.model.lora_targets:
            np.testing.assert_array_equal(named(back.params)[name], x, err_msg=name)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "bert"])
def test_adapters_that_peft_wrote_are_read(tmp_path, peft, family, seed):
    """On models of transformers, with ranks and alphas of their own for some modules, scaled by the root or not."""
    import torch

    draw = random.Random(f"{family} {seed}")
    settings, kind = drawn(family, draw)
    torch.manual_seed(seed)
    kind(settings).save_pretrained(tmp_path / "base")
    with_tokenizer(tmp_path / "base")
    names = {"gpt2": ["attn.c_attn", "c_fc"], "llama": ["q_proj", "down_proj"], "bert": ["query", "output.dense"],
             "gpt_neox": ["query_key_value", "dense_h_to_4h"]}[family]  # fmt: skip
    lora = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=names, use_rslora=draw.random() < 0.5, rank_pattern={names[1]: 2},
        alpha_pattern={names[0]: 7.5}, task_type=None if family == "bert" else "CAUSAL_LM",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), lora).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.add_(torch.randn_like(weight) * 0.1 * ("lora_B" in name))
            wanted = model(torch.asarray(TEXT)).logits.numpy()
            plain = kind.from_pretrained(tmp_path / "base").eval()(torch.asarray(TEXT)).logits.numpy()
        model.save_pretrained(tmp_path / "adapter")
    read = open_model(str(tmp_path / "adapter"))
    assert np.abs(logits(read.model, read.params, TEXT) - wanted).max() < 1e-4 < np.abs(plain - wanted).max()


def test_a_table_that_peft_trained_is_read_and_refused_where_the_head_tied_to_it_stays(tmp_path, peft):
    import torch

    for family, table, tied in (("gpt_neox", "embed_in", False), ("gpt2", "wte", True)):
        settings, kind = drawn(family, random.Random(0))
        settings.tie_word_embeddings = tied
        base, folder = tmp_path / family, tmp_path / f"{family}-adapter"
        kind(settings).save_pretrained(base)
        with_tokenizer(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(kind.from_pretrained(base), peft.LoraConfig(r=2, target_modules=[table])).eval()
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.add_(0.1 * ("lora_embedding_A" in name))
                wanted = model(torch.asarray(TEXT)).logits.numpy()
            model.save_pretrained(folder)
        if tied:
            with pytest.raises(ExchangeError, match=r"lora_embedding_A changes the token embedding, which this"):
                open_model(str(folder))
        else:
            read = open_model(str(folder))
            assert np.abs(logits(read.model, read.params, TEXT) - wanted).max() < 1e-4


def test_an_adapter_of_the_head_has_a_copy_of_the_head_which_must_be_the_bases(tmp_path, peft):
    """PEFT saves the base layer beside the LoRA matrices of a head by default."""
    import torch
    from safetensors.numpy import save_file

    settings, kind = drawn("llama", random.Random(0))
    settings.tie_word_embeddings = False
    kind(settings).save_pretrained(tmp_path / "base")
    with_tokenizer(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
        model = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), lora).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.add_(torch.randn_like(weight) * 0.1 * ("lora_B" in name))
            wanted = model(torch.asarray(TEXT)).logits.numpy()
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    read = open_model(str(tmp_path / "adapter"))
    assert np.abs(logits(read.model, read.params, TEXT) - wanted).max() < 1e-4
    tensors = stored(tmp_path / "adapter" / WEIGHTS)
    (copy,) = (name for name in tensors if "base_layer" in name)
    tensors[copy] = tensors[copy] + 1
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(ExchangeError, match=r"lm_head.base_layer.weight differs from that of the base model"):
        open_model(str(tmp_path / "adapter"))


def test_a_bert_has_adapters_too(tmp_path, peft):
    settings, kind = drawn("bert", random.Random(0))
    kind(settings).save_pretrained(tmp_path / "base")
    with_tokenizer(tmp_path / "base")
    ours = adapted(load_folder(tmp_path / "base"), 1)
    save_adapter(ours, tmp_path / "adapter", "base", tmp_path / "base")
    assert compare_logits(ours, tmp_path / "base", tmp_path / "adapter").difference < 1e-4


@pytest.fixture
def adapter(tmp_path) -> Path:
    """An adapter for a small GPT-2, in a folder next to it."""
    save_folder(made({}), tmp_path / "base")
    save_adapter(adapted(made({}), 0), tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "base")
    return tmp_path / "adapter"


def test_the_ranks_of_queries_and_values_share_one_matrix(adapter):
    settings, r = json.loads((adapter / "adapter_config.json").read_text()), adapted(made({}), 0).model.lora_rank
    assert settings["target_modules"] == ["attn.c_attn"] and settings["fan_in_fan_out"] is True
    assert settings["r"] == 2 * r and settings["rank_pattern"] == {} == settings["alpha_pattern"]
    b = stored(adapter / WEIGHTS)["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    assert b.shape == (3 * 16, 2 * r)
    assert not b[:16, r:].any() and not b[16:32].any() and not b[32:, :r].any() and b[:16, :r].all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(use_dora=True), r"use_dora = True: gptjax supports only None or False"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save = \['lm_head'\]"),
        (dict(peft_type="IA3"), "peft_type = 'IA3': gptjax supports only 'LORA'"),
        (dict(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
        (dict(bias="all", novelty=1), r"bias = 'all'(.|\n)*novelty = 1"),
        (dict(rank_pattern={"(a+)+$": 2}), "rank_pattern = .*ends of module names"),
        (dict(alpha_pattern={"c_attn": "x"}), "alpha_pattern = "),
        (dict(r=None), "r is missing"),
        (dict(r=99), r"lora_A.weight has shape .*need \[99, 16\]"),
        (dict(base_model_name_or_path=None), "base_model_name_or_path = None: the folder or hub name"),
        (dict(base_model_name_or_path="/no/where"), "has the base model '/no/where': .*does not exist"),
    ],
)
def test_every_field_of_an_adapter_config_is_understood_or_refused(adapter, changes, message):
    edit(adapter / "adapter_config.json", **changes)
    with pytest.raises(ExchangeError, match=message):
        open_model(str(adapter))


def test_an_adapter_of_another_model_or_with_other_tensors_is_refused(adapter, tmp_path):
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[:-1])
    with pytest.raises(ExchangeError, match="damaged or cut off"):
        open_model(str(adapter))
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(ExchangeError, match=r"adapter_model.bin and not in adapter_model.safetensors.*not unpickle"):
        open_model(str(adapter))
    (adapter / WEIGHTS).write_bytes(whole)
    shutil.rmtree(tmp_path / "base")
    save_folder(made(dict(num_layers=1)), tmp_path / "base")
    with pytest.raises(ExchangeError, match=r"h.1.attn.c_attn.lora_A.weight \(one of 2\) does not fit a gpt2 model"):
        open_model(str(adapter))
    (adapter / "secret").symlink_to(tmp_path / "base")
    with pytest.raises(ExchangeError, match="is a link to a file outside"):
        open_model(str(adapter))


def test_a_base_of_another_shape_is_refused_before_anything_is_written(tmp_path):
    save_folder(made(dict(num_layers=1, ffn="relu")), tmp_path / "base")
    with pytest.raises(ExchangeError) as caught:
        save_adapter(adapted(made({}), 0), tmp_path / "adapter", "base", tmp_path / "base")
    assert "(model.num_layers = 1, but the run has 2; model.ffn = 'relu', but the run has 'gelu')" in str(caught.value)
    assert not (tmp_path / "adapter").exists()


def test_without_peft_gptjax_reads_the_adapter_again(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("gptjax.interop.logit_check.find_spec", lambda name: None if name == "peft" else name)
    found = compare_logits(adapted(made({}), 0), tmp_path / "base", adapter)
    assert found.difference < 1e-5 and found.reference.endswith("(peft is not installed)")


@pytest.mark.slow
@pytest.mark.usefixtures("single_device")
def test_a_run_with_lora_is_exported_as_an_adapter_and_as_one_model(tmp_path, finished_run, capsys):
    lora = {"init": str(finished_run), "data.tokenizer": "init", "model.lora_rank": 2, "model.lora_alpha": 6.0,
            "model.lora_targets": ("query", "out", "up"), "optim.learning_rate": 3e-2}  # fmt: skip
    corpus = finished_run.parent / "corpus.txt"
    train.train(TINY.override({"data.source": str(corpus)} | lora), tmp_path / "lora")
    folders = [str(tmp_path / name) for name in ("base", "adapter", "lora", "whole", "again", "out")]
    base, adapter, run, whole, again, out = folders
    with pytest.raises(ExchangeError, match=f"gptjax export {finished_run} FOLDER, then add --base FOLDER"):
        export([run, adapter, "--adapter"])
    export([str(finished_run), base])
    export([run, adapter, "--adapter", "--base", base])
    said = capsys.readouterr().out
    assert "largest difference of logits to" in said and f"an adapter for {base}" in said
    export([run, whole])  # the LoRA weights are merged
    import_([adapter, again])
    a, b, c = (logits(x.model, x.params, TEXT[:, :16] % 257) for x in map(open_model, (run, whole, again)))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    np.testing.assert_allclose(a, c, rtol=0, atol=1e-5)
    for arguments, message in [
        ((str(finished_run), out, "--adapter"), r"was trained without LoRA \(model.lora_rank = 0\) and has no adapter"),
        ((run, out, "--base", base), "--base: no effect without --adapter"),
        (
            (run, out, "--adapter", "--dtype", "bfloat16"),
            "--dtype: no effect with --adapter",
        ),
        ((run, out, "--adapter", "--base", f"{tmp_path}/nowhere"), "nowhere: does not exist"),
    ]:
        with pytest.raises(GptjaxError, match=message):
            export([*arguments])
    shutil.rmtree(base)
    save_folder(made(dict(vocab_size=257, context_length=16, ffn_dim=64)), Path(base))
    with pytest.raises(Disagreement):  # the same shape with other weights
        export([run, out, "--adapter", "--base", base])
