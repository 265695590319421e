"""Hugging Face models: the same logits in both directions, the same bits there and back, and refused folders."""

import dataclasses
import json
import os
import pickle
import random
import shutil
import struct
import sys
from fnmatch import fnmatch
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model, tiny_run

from gptjax.commands.exchange import import_
from gptjax.config import Experiment, ModelConfig
from gptjax.data.batches import DataPosition
from gptjax.data.tokenizer import ByteTokenizer, CharTokenizer
from gptjax.errors import DataError, Disagreement, ExchangeError, GptjaxError, RunError
from gptjax.inference.pretrained import Pretrained
from gptjax.interop.huggingface import load_folder
from gptjax.interop.layout import nested, weight_shapes
from gptjax.interop.logit_check import Agreement, compare_logits, logits, require_agreement, rounded
from gptjax.interop.open import fetch, open_model
from gptjax.interop.runs import import_run
from gptjax.interop.saving import choose_family, save_folder
from gptjax.sharding import one_device
from gptjax.training import checkpoint
from gptjax.training.diagnosis import replay
from gptjax.training.evaluation import evaluate_run
from gptjax.training.optim import evaluation_params
from gptjax.training.preflight import check_start
from gptjax.training.provenance import start_run
from gptjax.training.restore import load_params, restore_state
from gptjax.training.run import open_run
from gptjax.training.state import leaf_name
from gptjax.training.train_setup import build_train_setup, create_state, first_state

VOCAB, CONTEXT = 260, 32  # of every model here; the byte tokenizer has 257 ids
TEXT = np.random.default_rng(0).integers(0, VOCAB, (2, CONTEXT))
ROPES = [
    dict(rope_theta=500.0, rope_type="default"),
    dict(rope_theta=1e4, rope_type="linear", factor=2.0),
    dict(rope_theta=1e4, rope_type="yarn", factor=4.0, original_max_position_embeddings=8),
    dict(
        rope_theta=1e4,
        rope_type="llama3",
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
]
SMALL = dict(vocab_size=VOCAB, context_length=CONTEXT, num_layers=2, embed_dim=16, num_heads=2, ffn_dim=24)
MODELS = {  # the family that is chosen -> models of gptjax that it can express
    "gpt2": [dict(), dict(ffn="gelu_exact", tie_embeddings=False), dict(bias=False, ffn="relu2")],
    "llama": [
        dict(norm="rmsnorm", positions="rope", ffn="swiglu", bias=False, num_kv_heads=1, tie_embeddings=False),
        dict(norm="rmsnorm", positions="rope", ffn="geglu", head_dim=12, rope_scaling="ntk", rope_factor=2.0),
        dict(norm="rmsnorm", positions="rope", ffn="swiglu", bias=False, rope_scaling="yarn", rope_factor=4.0),
        dict(norm="rmsnorm", positions="rope", ffn="swiglu", bias=False, rope_scaling="llama3", rope_factor=2.0),
    ],
    "gpt_neox": [
        dict(positions="rope", parallel_residual=True, partial_rotary_factor=0.25, tie_embeddings=False),
        dict(positions="rope", ffn="relu", rope_scaling="linear", rope_factor=2.0),
    ],
}
SCHEDULE_FREE = {"optim.name": "schedule_free", "optim.schedule": "constant"}
CASES = [(family, changes) for family, several in MODELS.items() for changes in several]


def made(changes: dict, seed: int = 0) -> Pretrained:
    """A model whose norms and biases are not the initial ones."""
    model, rng = ModelConfig(**SMALL | changes).resolved(), np.random.default_rng(seed)
    shapes = weight_shapes(model)
    layers = {name: (model.num_layers,) if name.startswith("blocks.") else () for name in shapes}
    weights = {name: rng.normal(0.2, 0.3, (*layers[name], *shape)).astype(np.float32) for name, shape in shapes.items()}
    recommended = {"temperature": 0.7, "top_k": 5}
    return Pretrained("made", model, nested(weights), ByteTokenizer(), recommended, (3,), "{{ messages }}")


def named(params) -> dict[str, np.ndarray]:
    return {leaf_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(params)}


def assert_same_bits(a, b) -> None:
    a, b = named(a), named(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """A small GPT-2 in a folder. Copy it before you harm it."""
    folder = tmp_path_factory.mktemp("exported") / "gpt2"
    save_folder(made({}), folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "gpt2"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# With transformers


def drawn(family: str, draw: random.Random):
    """A small config of transformers with random settings, and its model class."""
    import transformers as hf

    heads, width = draw.choice([2, 4]), draw.choice([4, 8])
    sizes = dict(
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_hidden_layers=draw.choice([1, 3]),
        intermediate_size=20,
        max_position_embeddings=CONTEXT,
        vocab_size=VOCAB,
        bos_token_id=1,
        eos_token_id=2,
    )
    tied = draw.random() < 0.5
    activation = draw.choice(["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
    if family == "gpt2":
        names = {"intermediate_size": "n_inner", "num_hidden_layers": "n_layer", "hidden_size": "n_embd",
                 "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}  # fmt: skip
        sizes = {names.get(name, name): value for name, value in sizes.items()}
        sizes["n_inner"] = draw.choice([None, 20])
        return hf.GPT2Config(**sizes, activation_function=activation, tie_word_embeddings=tied), hf.GPT2LMHeadModel
    if family == "llama":
        bias = draw.random() < 0.5
        made_of = dict(
            num_key_value_heads=draw.choice([1, 2, heads]),
            head_dim=draw.choice([None, 6]),
            rope_parameters=dict(draw.choice(ROPES)),
            hidden_act=draw.choice(["silu", "gelu_pytorch_tanh"]),
            rms_norm_eps=draw.choice([1e-5, 1e-6]),
        )
        made_of |= dict(attention_bias=bias, mlp_bias=bias, tie_word_embeddings=tied)
        return hf.LlamaConfig(**sizes, **made_of), hf.LlamaForCausalLM
    if family == "gpt_neox":
        made_of = dict(
            rotary_pct=draw.choice([0.5, 1.0, 0.6]),
            rotary_emb_base=draw.choice([10_000, 500]),
            use_parallel_residual=draw.random() < 0.5,
        )
        return (
            hf.GPTNeoXConfig(**sizes, **made_of, hidden_act=activation, tie_word_embeddings=tied),
            hf.GPTNeoXForCausalLM,
        )
    return hf.BertConfig(**sizes, hidden_act=activation), hf.BertForMaskedLM


def theirs(folder: Path, family: str, seed: int):
    """Writes a random model of transformers, norms and biases moved, with the byte tokenizer beside it; its logits."""
    import torch

    torch.manual_seed(seed)
    settings, kind = drawn(family, random.Random(f"{family} {seed}"))
    model = kind(settings).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
        out = model(torch.asarray(TEXT)).logits.numpy()
    model.save_pretrained(folder)
    with_tokenizer(folder)
    return model, out


def with_tokenizer(folder: Path) -> None:
    from gptjax.data.tokenizer.huggingface_write import to_huggingface

    to_huggingface(ByteTokenizer(), folder)


@pytest.fixture
def quiet():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "bert"])
def test_logits_are_those_of_transformers(tmp_path, quiet, family, seed):
    model, wanted = theirs(tmp_path / "theirs", family, seed)
    read = load_folder(tmp_path / "theirs")
    assert np.abs(logits(read.model, read.params, TEXT) - wanted).max() < 1e-4
    if family == "bert":
        with pytest.raises(ExchangeError, match=r"gpt2 does not support .*model.causal = False"):
            choose_family(read.model)
        return
    save_folder(read, tmp_path / "again")
    assert choose_family(read.model).name == family
    again = load_folder(tmp_path / "again")
    assert again.model == read.model and (again.generation_config, again.stop_tokens) == (
        read.generation_config,
        read.stop_tokens,
    )
    assert_same_bits(again.params, read.params)
    state = type(model).from_pretrained(tmp_path / "again").state_dict()
    for name, weight in model.state_dict().items():
        assert np.array_equal(weight.numpy(), state[name].numpy()), name


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_transformers_has_the_logits_of_an_export(tmp_path, quiet, family, changes):
    ours = made(changes)
    assert choose_family(ours.model).name == family
    save_folder(ours, tmp_path / "out")
    found = compare_logits(ours, tmp_path / "out")
    assert found.difference < 1e-4 and found.reference == "transformers"


def test_bfloat16_weights(tmp_path, quiet):
    import torch

    model, _ = theirs(tmp_path / "theirs", "llama", 1)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    read = load_folder(tmp_path / "theirs")
    assert {str(x.dtype) for x in named(read.params).values()} == {"bfloat16"}
    assert compare_logits(read, tmp_path / "theirs").difference < 1e-4
    save_folder(read, tmp_path / "again", dtype="bfloat16")
    assert_same_bits(load_folder(tmp_path / "again").params, read.params)


def test_special_tokens_without_an_embedding_are_left_out(tmp_path, capfd):
    """A token for padding that was added to the tokenizer, and never to the model."""
    ours = made({"vocab_size": 257})
    save_folder(ours, tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    pad = spec["added_tokens"][-1] | {"id": 257, "content": "<pad>", "special": True}
    for added, message in (([pad], None), ([pad | {"special": False}], "it is the wrong tokenizer")):
        edit(tmp_path / "tokenizer.json", added_tokens=[*spec["added_tokens"], *added])
        if message:
            with pytest.raises(ExchangeError, match=message):
                load_folder(tmp_path)
            continue
        read = load_folder(tmp_path)
        assert "<pad> of the tokenizer is left out: the model has only 257 embeddings" in capfd.readouterr().err
        assert read.tokenizer.vocab_size == 257 and "<pad>" not in read.tokenizer.special_tokens
        np.testing.assert_array_equal(read.tokenizer.encode("a <pad> b"), ours.tokenizer.encode("a <pad> b"))


def test_weights_with_nan_are_refused_by_their_name(tmp_path):
    save_folder(made({}), tmp_path)

    def spoil(tensors):
        tensors["transformer.h.0.mlp.c_fc.weight"][0, 0] = np.nan

    edit_weights(tmp_path, spoil)
    with pytest.raises(ExchangeError, match=r"model.safetensors: transformer.h.0.mlp.c_fc.weight holds NaN or Inf"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "buffers"),
    [
        ("gpt2", {}, {"transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), bool), "h.0.attn.masked_bias": np.int64(-9)}),
        (
            "gpt_neox",
            dict(CASES)["gpt_neox"],
            {"gpt_neox.layers.0.attention.bias": np.ones((1, 1, 4, 4), np.uint8)},
        ),
    ],
    ids=["gpt2", "gpt_neox"],
)
def test_buffers_that_are_no_weights_may_have_any_dtype(tmp_path, family, changes, buffers):
    """Masks in BOOL or U8, as older versions of transformers saved them; no weight may be so."""
    ours = made(changes)
    assert choose_family(ours.model).name == family
    save_folder(ours, tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update(buffers))
    assert_same_bits(load_folder(tmp_path).params, ours.params)
    edit_weights(tmp_path, lambda tensors: tensors.update({"h.0.other": np.ones(3, bool)}))
    with pytest.raises(ExchangeError, match=r"h\.0\.other has dtype BOOL; gptjax reads F32, F16, BF16"):
        load_folder(tmp_path)


def test_a_bert_without_its_head_is_refused(tmp_path, quiet):
    import transformers

    settings, _ = drawn("bert", random.Random(0))
    transformers.BertModel(settings).save_pretrained(tmp_path)
    with pytest.raises(ExchangeError, match=r"cls.predictions.bias.* missing .*without its masked-language-model head"):
        load_folder(tmp_path)


def test_berts_old_names_and_other_heads_are_understood(tmp_path, quiet):
    _, wanted = theirs(tmp_path, "bert", 0)

    def change(tensors):
        for name in [n for n in tensors if "LayerNorm" in n]:
            tensors[name.replace("weight", "gamma").replace("bias", "beta")] = tensors.pop(name)
        tensors["bert.pooler.dense.weight"] = tensors["cls.seq_relationship.weight"] = np.zeros((2, 2), np.float32)
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]

    edit_weights(tmp_path, change)
    read = load_folder(tmp_path)
    assert np.abs(logits(read.model, read.params, TEXT) - wanted).max() < 1e-4


# There and back, without transformers


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_there_and_back_has_the_same_bits(tmp_path, family, changes):
    ours = made(changes)
    save_folder(ours, tmp_path / "out", max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("out/model-0*"))) > 1
    back = load_folder(tmp_path / "out")
    assert (back.generation_config, back.chat_template) == (ours.generation_config, ours.chat_template)
    assert back.stop_tokens == ours.stop_tokens
    assert back.tokenizer.id_to_bytes[:256] == ours.tokenizer.id_to_bytes[:256]
    if changes.get("rope_scaling") == "ntk":  # comes back as a larger base
        assert back.model.rope_scaling == "none" and back.model.rope_theta > 10_000
    elif changes.get("bias") is False and ours.model.norm == "layernorm":  # comes back with biases of zero
        assert back.model.bias
        extra = named(back.params).keys() - named(ours.params).keys()
        assert extra and not any(named(back.params)[name].any() for name in extra)
    else:
        assert back.model == ours.model
        assert_same_bits(back.params, ours.params)
        return
    np.testing.assert_allclose(
        logits(back.model, back.params, TEXT), logits(ours.model, ours.params, TEXT), atol=1e-5, rtol=0
    )


def test_fields_that_no_family_can_express_are_named():
    with pytest.raises(ExchangeError) as caught:
        choose_family(made(dict(positions="alibi", qk_norm=True, sliding_window=4, logit_softcap=30.0)).model)
    for words in ("gpt2 does not support", "llama does", "gpt_neox does",
                  "positions = 'alibi'", "qk_norm", "sliding_window = 4",
                  "logit_softcap = 30.0"):  # fmt: skip
        assert words in str(caught.value)
    with pytest.raises(ExchangeError, match="ffn = 'none'"):
        choose_family(made(dict(ffn="none")).model)
    with pytest.raises(ExchangeError, match="mup_base_width = 4"):
        choose_family(made(dict(mup_base_width=4)).model)
    with pytest.raises(ExchangeError, match="choose one of auto, gpt2, gpt_neox, llama"):
        choose_family(made({}).model, "bert")


def test_names_with_and_without_the_prefix(exported, folder):
    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
        tensors["lm_head.weight"] = tensors["wte.weight"]

    edit_weights(folder, change)
    assert_same_bits(load_folder(folder).params, load_folder(exported).params)
    edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["wte.weight"] + 1}))
    with pytest.raises(ExchangeError, match=r"lm_head.weight differs from wte.weight"):
        load_folder(folder)
    edit_weights(folder, lambda tensors: tensors.update({"transformer.wte.weight": tensors["wte.weight"]}))
    with pytest.raises(ExchangeError, match="are the same weight"):
        load_folder(folder)


def test_the_old_and_the_new_form_of_rope_are_one(tmp_path):
    ours = made(dict(norm="rmsnorm", positions="rope", ffn="swiglu", rope_scaling="yarn", rope_factor=4.0))
    save_folder(ours, tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_scaling") | {"rope_theta": values.pop("rope_theta")}
    path.write_text(json.dumps(values | {"rope_parameters": rope}))
    assert load_folder(tmp_path / "llama").model == ours.model
    path.write_text(json.dumps(values | {"rope_parameters": rope | {"beta_fast": 16, "mscale": 2.0, "extra": 1}}))
    with pytest.raises(ExchangeError, match=r"rope_parameters.beta_fast = 16(.|\n)*rope_parameters.extra = 1"):
        load_folder(tmp_path / "llama")


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scale_attn_weights=False, novelty=1), r"novelty = 1: gptjax does not(.|\n)*"),
        (dict(scale_attn_weights=False), r"scale_attn_weights = False: gptjax supports only True"),
        (dict(add_cross_attention=True), "add_cross_attention = True"),
        (dict(activation_function="mish"), "activation_function = 'mish': gptjax supports gelu_new"),
        (dict(n_embd="16"), "n_embd = '16': must be int"),
        (dict(n_embd=-16), "n_embd = -16: must be at least 1"),
        (dict(n_layer=None), "n_layer is missing"),
        (dict(n_head=3), "gives model.num_heads = 3: does not divide"),
        (dict(n_layer=1 << 16), "has 65,536 layers"),
        (dict(n_inner=25), r"h.0.mlp.c_fc.weight has shape \[16, 24\]; by config.json it must be \[16, 25\]"),
        (dict(vocab_size=1 << 62), r"vocab_size = .*: must be at least 1 and at most 67,108,864"),
        (dict(vocab_size=1 << 26, n_embd=1 << 19, n_head=1), r"it must be \[67108864, 524288\]"),
        (dict(model_type=[]), r"model_type = \[\]"),
        (dict(n_layer=3), r"transformer.h.2.* and 8 others are missing"),
        (dict(n_layer=1), r"transformer.h.1.* are in the weights but not part of a gpt2"),
        (dict(tie_word_embeddings=False), "lm_head.weight is missing"),
        (dict(model_type="mamba"), "model_type = 'mamba': gptjax supports gpt2, gpt_neox, llama, bert"),
        (dict(auto_map={"AutoModel": "modeling.py"}), "auto_map"),
        (dict(eos_token_id="x"), None),
    ],
)
def test_settings_that_are_not_understood_are_named(folder, changes, message):
    edit(folder / "config.json", **changes)
    if message is None:  # generation_config.json takes precedence
        load_folder(folder)
        (folder / "generation_config.json").unlink()
        message = "eos_token_id = 'x': must be a token id or a list of them"
    with pytest.raises(ExchangeError, match=message):
        load_folder(folder)


def test_all_problems_are_reported_at_once(folder):
    edit(folder / "config.json", scale_attn_weights=False, novelty=1, n_head=0)
    with pytest.raises(ExchangeError) as caught:
        load_folder(folder)
    assert len(caught.value.problems) == 3


def test_the_recommended_sampling_parameters(folder):
    edit(folder / "generation_config.json", do_sample=False, top_k=0, min_p=0.1, eos_token_id=[7, 9], temperature=0.6)
    read = load_folder(folder)
    assert read.generation_config == {"temperature": 0.0, "min_p": 0.1} and read.stop_tokens == (7, 9)
    edit(folder / "generation_config.json", min_p=7)
    with pytest.raises(ExchangeError, match=r"min_p = 7"):
        load_folder(folder)


def test_unsupported_sampling_rules_are_named_and_kept(folder, tmp_path, capsys):
    """From a folder to a run to a folder: nothing in generation_config.json is lost."""
    path = folder / "generation_config.json"
    harmless = dict(pad_token_id=5, max_length=50, transformers_version="4.30", top_k=0, typical_p=1.0, num_beams=1)
    edit(path, **harmless, do_sample=False, temperature=0.6, min_length=0, suppress_tokens=[], constraints=None)
    assert load_folder(folder).generation_config == {"temperature": 0.0} and capsys.readouterr().err == ""
    edit(path, num_beams=4, suppress_tokens=list(range(99)), novel_rule=0.5, forced_bos_token_id=0, do_sample=True)
    read = load_folder(folder)
    (line,) = capsys.readouterr().err.splitlines()
    for part in ("warning: ", "num_beams = 4", "suppress_tokens = [0, 1, 2, 3, 4, 5, ...]", "novel_rule = 0.5",
                 "forced_bos_token_id = 0", "may differ from those of transformers"):  # fmt: skip
        assert part in line
    for silent in harmless.keys() - {"num_beams"}:
        assert silent not in line
    import_run(read, tmp_path / "run", "x")
    save_folder(open_model(str(tmp_path / "run")), tmp_path / "again")
    before, after = (json.loads((at / "generation_config.json").read_text()) for at in (folder, tmp_path / "again"))
    ids = {"bos_token_id", "eos_token_id"}  # which a tokenizer has a say in
    assert {n: v for n, v in after.items() if n not in ids} == {n: v for n, v in before.items() if n not in ids}
    greedy = dataclasses.replace(read, generation_config={"temperature": 0.0})
    save_folder(greedy, tmp_path / "greedy")
    assert load_folder(tmp_path / "greedy").generation_config == {"temperature": 0.0}, "the new recommendation counts"


def test_chat_templates_of_both_kinds(folder):
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    for given, wanted in [("t", "t"), (named, "y"), (None, None)]:
        edit(folder / "tokenizer_config.json", chat_template=given)
        assert load_folder(folder).chat_template == wanted


def test_the_wrong_tokenizer_is_refused(folder):
    def change(tensors):
        tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:200]

    edit(folder / "config.json", vocab_size=200)
    edit_weights(folder, change)
    with pytest.raises(ExchangeError, match=r"has 257 ids and the model 200: it is the wrong tokenizer"):
        load_folder(folder)


def test_a_stop_token_that_the_tokenizer_lacks_is_refused(folder):
    edit(folder / "generation_config.json", eos_token_id=[3, 258])
    with pytest.raises(ExchangeError, match=r"eos_token_id = 258, but the tokenizer has only 257 ids: it is the wrong"):
        load_folder(folder)


@pytest.mark.parametrize(
    ("ids", "rows", "doubtful"),
    [
        (50_277, 50_304, False),  # Pythia 160M
        (50_277, 50_688, False),  # Pythia 12B
        (32_000, 32_000, False),  # Llama 2
        (49_152, 49_152, False),  # SmolLM
        (259, 384, False),  # ByT5
        (257, 514, False),
        (257, 515, True),
        (32_000, 33_023, False),
        (32_000, 33_024, True),
        (32_000, 50_257, True),  # Llama's tokenizer, GPT-2's size
        (50_257, 128_256, True),  # GPT-2's tokenizer, Llama 3's size
    ],
)
def test_a_tokenizer_far_smaller_than_its_model_is_doubted(ids, rows, doubtful, tmp_path, capsys):
    characters = "".join(map(chr, range(0x100, 0x100 + ids)))
    ours = made(dict(vocab_size=rows, context_length=4, num_layers=1, embed_dim=2, num_heads=1, ffn_dim=2))
    tokenizer = CharTokenizer(characters, has_eos=False)
    assert tokenizer.vocab_size == ids
    save_folder(dataclasses.replace(ours, tokenizer=tokenizer), tmp_path / "out")
    assert capsys.readouterr().err == "", "whoever writes a model knows its tokenizer"
    assert load_folder(tmp_path / "out").tokenizer.vocab_size == ids
    doubt = f"warning: {tmp_path}/out: the tokenizer has {ids:,} ids and the model {rows:,}."
    assert capsys.readouterr().err.startswith(doubt) if doubtful else capsys.readouterr().err == ""


class Payload:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['GPTJAX_TEST_MARK']}",)


def test_pickles_are_never_opened(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTJAX_TEST_MARK", str(tmp_path / "it-ran"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ExchangeError, match=r"has neither model.safetensors nor"):
        load_folder(folder)
    for name in ("pytorch_model.bin", "training_args.bin", "model.safetensors", "config.json"):
        (folder / name).write_bytes(pickle.dumps(Payload()))
        with pytest.raises(GptjaxError, match=r"pytorch_model.bin.*does not unpickle|header|damaged"):
            load_folder(folder)
    assert not (tmp_path / "it-ran").exists()


def test_giant_headers_are_refused_before_they_take_memory(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (1 << 62, len(whole)):
        path.write_bytes(struct.pack("<Q", size) + whole[8:])
        with pytest.raises(ExchangeError, match="its header is longer than the file"):
            load_folder(folder)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 40))
        file.truncate(1 << 41)  # two terabytes of nothing
    with pytest.raises(ExchangeError, match=r"has a header of 1,099,511,627,776 bytes"):
        load_folder(folder)


def test_damaged_weights_are_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    for content in (whole[:-1], whole[: size // 2], whole[:4], b"", whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(ExchangeError, match=r"damaged|cut off"):
            load_folder(folder)

    def with_header(**changes) -> None:
        text = json.dumps(header | changes).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])

    at = header["transformer.wte.weight"]
    for spoilt in (at | {"data_offsets": [0, 1 << 50]}, at | {"shape": [1 << 31, 1 << 31]}, at | {"dtype": "Q4"}):
        with_header(**{"transformer.wte.weight": spoilt})
        with pytest.raises(ExchangeError, match="damaged"):
            load_folder(folder)
    with_header(**{"transformer.wte.weight": at | {"dtype": "I32"}})
    with pytest.raises(ExchangeError, match="has dtype I32; gptjax reads F32, F16, BF16"):
        load_folder(folder)


def test_shards_that_are_missing_lead_out_or_are_not_as_the_index_says(tmp_path):
    folder = tmp_path / "sharded"
    save_folder(made({}), folder, max_shard_bytes=20_000)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for name in ("../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "model.bin"):
        index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | {"transformer.wte.weight": name}}))
        with pytest.raises(ExchangeError, match="is not the name of a safetensors file in this folder"):
            load_folder(folder)
    for bad in ({}, {"weight_map": [1]}, {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(bad))
        with pytest.raises(ExchangeError, match="is damaged: weight_map"):
            load_folder(folder)
    index.write_text(json.dumps({"weight_map": good["weight_map"] | {"novel": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ExchangeError, match=r"says that novel is in"):
        load_folder(folder)
    index.write_text(json.dumps(good))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ExchangeError, match=r"00002-of-00002.safetensors is in model.safetensors.index.json but missing"
    ):
        load_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "notes.txt"])
def test_links_that_lead_out_are_refused(folder, tmp_path, name):
    (tmp_path / "outside").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ExchangeError, match=f"{name} is a link to a file outside of the folder"):
        load_folder(folder)


def test_the_links_of_the_hubs_cache_are_followed(exported, tmp_path):
    home = tmp_path / "models--us--tiny"
    snapshot = home / "snapshots" / "abc"
    shutil.copytree(exported, home / "blobs")
    snapshot.mkdir(parents=True)
    for path in (home / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert_same_bits(load_folder(snapshot).params, load_folder(exported).params)
    (tmp_path / "models--other" / "blobs").mkdir(parents=True)
    (tmp_path / "models--other" / "blobs" / "x").write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "models--other" / "blobs" / "x")
    with pytest.raises(ExchangeError, match="is a link to a file outside"):
        load_folder(snapshot)


def test_devices_are_refused(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")  # who opens it for reading waits for ever
    with pytest.raises(ExchangeError, match=r"config.json is neither a file nor a folder"):
        load_folder(folder)


# Runs


@pytest.mark.usefixtures("single_device")
def test_an_imported_run_is_the_model_again(folder, tmp_path):
    read = load_folder(folder, "the-source")
    run = import_run(read, tmp_path / "run", "the-source", "bfloat16")
    assert run.experiment.model.dtype == "bfloat16" and run.provenance()["imported"] == "the-source"
    back = open_model(str(tmp_path / "run"))
    assert_same_bits(back.params, read.params)
    assert (back.generation_config, back.stop_tokens, back.chat_template) == (
        read.generation_config, read.stop_tokens, read.chat_template)  # fmt: skip
    (only,) = checkpoint.listing(run.checkpoints)
    assert only.step == 0 and checkpoint.problem(only) is None
    with pytest.raises(ExchangeError, match="already exists and is not empty"):
        import_run(read, tmp_path / "run", "x")
    (tmp_path / "run" / "generation.json").write_text(json.dumps({"recommended": {"temperature": -1}}))
    with pytest.raises(RunError, match=r"generation.json: is damaged"):
        open_model(str(tmp_path / "run"))


@pytest.mark.slow
def test_training_starts_from_an_imported_run_and_never_in_it(tmp_path):
    e = tiny_run(tmp_path)
    model = e.resolved(ByteTokenizer().vocab_size).model
    changes = {name: getattr(model, name) for name in SMALL}
    ours = made(changes)
    imported = import_run(ours, tmp_path / "imported", "ours")
    setup = build_train_setup(e.override(init=str(imported.folder)), one_device())
    for refused in (
        lambda: start_run(imported.folder, setup.experiment, setup.store),
        lambda: evaluate_run(imported),
        lambda: replay(imported, 1),
    ):
        with pytest.raises(RunError, match=r"holds weights imported from ours.*--init"):
            refused()
    with pytest.raises(RunError, match=r"holds imported weights without a train state; .* set init to this run"):
        restore_state(checkpoint.choose(imported.checkpoints), setup.abstract, setup.experiment)
    check_start(setup)
    assert_same_bits(first_state(setup, None).params, ours.params)


@pytest.mark.parametrize("changes", [{"optim.ema_decay": 0.5}, SCHEDULE_FREE, {}])
def test_only_the_weights_are_read_from_a_full_checkpoint(tmp_path, monkeypatch, changes):
    setup = build_train_setup(tiny_run(tmp_path, **changes), one_device())
    state = create_state(setup.experiment, setup.tx, setup.abstract)
    start_run(tmp_path, setup.experiment, setup.store)
    run = open_run(tmp_path)
    writer = checkpoint.CheckpointWriter(run.checkpoints, 1, 0)
    moved = jax.tree.map(lambda x: x + 1 if x.ndim > 1 else x, state.opt_state)
    writer.save(state._replace(opt_state=moved), DataPosition())
    writer.close()
    seen, restore = [], checkpoint.restore
    monkeypatch.setattr(checkpoint, "restore", lambda c, abstract: seen.append(abstract) or restore(c, abstract))
    params, _ = load_params(run, "last")
    assert_same_bits(params, evaluation_params(state.params, moved))
    assert any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (params, state.params)), strict=True)) == bool(
        changes
    )
    read = sum(x is not checkpoint.UNREAD for x in jax.tree.leaves(seen[0]))
    weights = len(jax.tree.leaves(params))
    assert weights <= read <= 2 * weights + 1 < len(jax.tree.leaves(seen[0]))


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    ours = made({})
    ours.params["blocks"]["ffn"]["up"][0, 0, 0] = np.nan
    with pytest.raises(ExchangeError, match=r"blocks.ffn.up and 0 other weights have non-finite values"):
        import_run(ours, tmp_path / "run", "x")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(ExchangeError, match=r"cannot be written \(.*No space left on device"):
        save_folder(ours, tmp_path / "out")
    monkeypatch.setattr("gptjax.interop.runs.new_provenance", full)
    with pytest.raises(ExchangeError, match=r"cannot be written \(No space left on device"):
        import_run(made({}), tmp_path / "run", "x")
    assert not list(tmp_path.glob("*/*"))


def test_disagreement_has_its_own_exit_code(folder):
    ours = made({})
    assert compare_logits(ours, folder).difference < 1e-4
    ours.params["embedding"]["tokens"] += 0.1
    with pytest.raises(Disagreement, match=r"largest difference of logits") as caught:
        require_agreement(compare_logits(ours, folder), "x")
    assert caught.value.exit_code == 3
    with pytest.raises(Disagreement):
        require_agreement(Agreement(float("nan"), 1e-4, "y"), "x")


def test_without_transformers_gptjax_reads_the_folder_again(folder, monkeypatch):
    monkeypatch.setattr("gptjax.interop.logit_check.find_spec", lambda name: None)
    found = compare_logits(made({}), folder)
    assert found.difference == 0 and "not installed" in found.reference
    assert rounded(made({}), "bfloat16").params["final_norm"]["scale"].dtype == jnp.bfloat16


# Names


def test_names_that_are_not_models_are_explained(tmp_path, monkeypatch):
    assert fetch(str(tmp_path)) == tmp_path
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    for name, message in [
        (str(tmp_path / "file"), "is a file"),
        (str(tmp_path / "absent"), "does not exist"),
        (str(tmp_path / "other"), "holds neither experiment.json .* nor config.json"),
        ("nobody/nothing", r"is not a folder here \(a run must be trained first\), and cannot be downloaded"),
    ]:
        with pytest.raises(GptjaxError, match=message):
            open_model(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ExchangeError, match="is not installed"):
        fetch("gpt2")


def test_only_files_that_are_read_are_downloaded(exported, monkeypatch):
    options_given = {}

    def download(name: str, **options):
        options_given.update(options, name=name)
        return str(exported)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_model("us/tiny").name == "us/tiny" and options_given["name"] == "us/tiny"
    for name, wanted in [("model.safetensors", True), ("tokenizer.model", True), ("pytorch_model.bin", False),
                         ("modeling.py", False), ("onnx/config.json", False)]:  # fmt: skip
        fetched = any(fnmatch(name, p) for p in options_given["allow_patterns"])
        assert (fetched and not any(fnmatch(name, p) for p in options_given["ignore_patterns"])) == wanted, name


def test_the_experiment_of_an_import_is_a_baseline(folder, tmp_path):
    run = import_run(load_folder(folder), tmp_path / "run", "x")
    assert Experiment.from_json(run.experiment.to_json()).model == load_folder(folder).model
    assert tiny_model().dtype == run.experiment.model.dtype == "float32"


@pytest.mark.usefixtures("single_device")
def test_a_tokenizer_can_be_named_for_an_import(folder, finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gptjax.commands.exchange.start_jax", lambda: None)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            (folder / name).rename(tokenizer / name)
    with pytest.raises(DataError, match=r"has no tokenizer; .*or name one for gptjax import with --tokenizer"):
        import_([str(folder), str(tmp_path / "none")])
    for number, name in enumerate(("byte", str(tokenizer), str(finished_run), str(finished_run / "tokenizer"))):
        import_([str(folder), str(tmp_path / f"run{number}"), "--tokenizer", name])
        found = open_model(str(tmp_path / f"run{number}")).tokenizer
        assert found.decode(found.encode("line 1")) == "line 1"
    assert "largest difference of logits" in capsys.readouterr().out
    with pytest.raises(ExchangeError, match="nowhere: does not exist"):
        import_([str(folder), str(tmp_path / "none"), "--tokenizer", f"{tmp_path}/nowhere"])
    edit(folder / "config.json", vocab_size=200)
    edit_weights(folder, lambda t: t.update({"transformer.wte.weight": t["transformer.wte.weight"][:200]}))
    with pytest.raises(ExchangeError, match="it is the wrong tokenizer"):
        import_([str(folder), str(tmp_path / "none"), "--tokenizer", "byte"])
    assert not (tmp_path / "none").exists()
