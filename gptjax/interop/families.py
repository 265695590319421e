"""The families of models that Hugging Face's transformers has and gptjax can be: their settings and their tensors.

To add one: how its config.json becomes a `Model`, how a `Model` becomes one, and where each weight lies. What a family
cannot express needs no list: `inexpressible` writes a model's settings, reads them again and names what has changed.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gptjax import config
from gptjax.interop.fields import Fields
from gptjax.interop.layout import Tensor
from gptjax.interop.rope import read_rope, write_rope

ACTIVATIONS = {  # theirs -> ours; the first of several is the one that is written
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "relu": "relu",
    "relu2": "relu2",
}
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
# How a model is trained and computed, not what it computes: no family keeps these.
NOT_KEPT = ("init_std", "init_depth_scaled", "dropout", "layers", "remat", "dtype", "attention_kernel")


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers."""

    name: str
    architecture: str  # the class that has its language-model head
    read: Callable[[Fields], config.Model]  # problems go into the fields; the model is resolved
    write: Callable[[config.Model], dict[str, Any]] | None  # None: read only
    tensors: Callable[[config.Model], list[Tensor]]
    prefix: str  # of the tensors of its body, which some files leave out
    outside: tuple[str, ...]  # names, and beginnings of names, that have no prefix
    buffers: str  # a pattern of what files hold besides the weights, without effect on the logits
    renamed: tuple[tuple[str, str], ...] = ()  # endings of older files, and what they are now
    copies: dict[str, str] = field(default_factory=dict)  # what tied models may hold twice -> the tensor it must equal
    folded: dict[str, str] = field(default_factory=dict)  # a table whose first row is added to every row of another
    without_head: str = ""  # what to say where nothing but the head is missing

    def canonical(self, name: str) -> str:
        """A tensor's name without the prefix, as `tensors` has it."""
        for old, new in self.renamed:
            name = name.removesuffix(old) + new if name.endswith(old) else name
        return name.removeprefix(self.prefix)

    def full_name(self, name: str) -> str:
        """A tensor's name as transformers writes it."""
        return name if name.startswith(self.outside) else self.prefix + name


def _read_gpt2(f: Fields) -> config.Model:
    embed, heads = f.need("n_embd", int, 768), f.need("n_head", int, 12)
    f.inert(scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), reorder_and_upcast_attn=(False, True))
    return config.Model(
        vocab_size=f.need("vocab_size", int, 1),
        context_length=f.need("n_positions", int, 1024),
        num_layers=f.need("n_layer", int, 12),
        embed_dim=embed,
        num_heads=heads,
        ffn_dim=f.take("n_inner", int, None),
        ffn=f.choose("activation_function", ACTIVATIONS, "gelu_new"),
        norm_epsilon=f.take("layer_norm_epsilon", float, 1e-5),
        dropout=_same_rate(f, "resid_pdrop", "embd_pdrop", "attn_pdrop", default=0.1),
        init_std=f.take("initializer_range", float, 0.02),
        tie_embeddings=f.take("tie_word_embeddings", bool, True),
    )


def _write_gpt2(m: config.Model) -> dict[str, Any]:
    return {
        "vocab_size": m.vocab_size,
        "n_positions": m.context_length,
        "n_embd": m.embed_dim,
        "n_layer": m.num_layers,
        "n_head": m.num_heads,
        "n_inner": m.ffn_dim,
        "activation_function": _word(ACTIVATIONS, m.ffn),
        "layer_norm_epsilon": m.norm_epsilon,
        "resid_pdrop": m.dropout,
        "embd_pdrop": m.dropout,
        "attn_pdrop": m.dropout,
        "initializer_range": m.init_std,
        "tie_word_embeddings": m.tie_embeddings,
    }


def _gpt2_tensors(m: config.Model) -> list[Tensor]:
    def both(theirs: str, *ours: str, stacked: int = 0) -> list[Tensor]:
        """Weight and bias of a Conv1D."""
        kinds = {"weight": "", "bias": "_bias"}
        return [Tensor(f"h.{{i}}.{theirs}.{k}", tuple(f"blocks.{o}{s}" for o in ours), stacked=stacked)
                for k, s in kinds.items()]  # fmt: skip

    return [
        Tensor("wte.weight", ("embedding.tokens",)),
        Tensor("wpe.weight", ("embedding.positions",)),
        *_norm("h.{i}.ln_1", "blocks.attention_norm"),
        *both("attn.c_attn", "attention.query", "attention.key", "attention.value", stacked=-3),
        *both("attn.c_proj", "attention.out"),
        *_norm("h.{i}.ln_2", "blocks.ffn_norm"),
        *both("mlp.c_fc", "ffn.up"),
        *both("mlp.c_proj", "ffn.down"),
        *_norm("ln_f", "final_norm"),
        *_head(m, "lm_head.weight"),
    ]


def _read_llama(f: Fields) -> config.Model:
    embed, heads = f.need("hidden_size", int, 4096), f.need("num_attention_heads", int, 32)
    context = f.need("max_position_embeddings", int, 2048)
    rope, share = read_rope(f, context)
    if share not in (None, 1):
        f.problems.append(f"partial_rotary_factor = {share}: a Llama turns whole heads")
    bias, mlp_bias = f.take("attention_bias", bool, False), f.take("mlp_bias", bool, False)
    if bias != mlp_bias:
        f.problem("mlp_bias", f"attention_bias is {bias}; gptjax has biases in all linear layers or in none")
    f.take("attention_dropout", float, 0.0)  # gptjax's dropout acts in more places: it is left at 0
    f.inert(pretraining_tp=tuple(range(1, 65)), rope_interleaved=(False,))
    return config.Model(
        vocab_size=f.need("vocab_size", int, 1),
        context_length=context,
        num_layers=f.need("num_hidden_layers", int, 32),
        embed_dim=embed,
        num_heads=heads,
        num_kv_heads=f.take("num_key_value_heads", int, None),
        head_dim=f.take("head_dim", int, None),
        ffn_dim=f.need("intermediate_size", int, 11008),
        ffn=f.choose("hidden_act", GATED, "silu"),
        positions="rope",
        norm="rmsnorm",
        norm_epsilon=f.take("rms_norm_eps", float, 1e-6),
        bias=bias,
        init_std=f.take("initializer_range", float, 0.02),
        tie_embeddings=f.take("tie_word_embeddings", bool, False),
        **rope,
    )


def _write_llama(m: config.Model) -> dict[str, Any]:
    return {
        "vocab_size": m.vocab_size,
        "max_position_embeddings": m.context_length,
        "hidden_size": m.embed_dim,
        "intermediate_size": m.ffn_dim,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "hidden_act": _word(GATED, m.ffn),
        "rms_norm_eps": m.norm_epsilon,
        "attention_bias": m.bias,
        "mlp_bias": m.bias,
        "initializer_range": m.init_std,
        "tie_word_embeddings": m.tie_embeddings,
        **write_rope(m),
    }


def _llama_tensors(m: config.Model) -> list[Tensor]:
    return [
        Tensor("embed_tokens.weight", ("embedding.tokens",)),
        *_norm("layers.{i}.input_layernorm", "blocks.attention_norm", bias=False),
        *_linear("layers.{i}.self_attn.q_proj", "blocks.attention.query", bias=m.bias),
        *_linear("layers.{i}.self_attn.k_proj", "blocks.attention.key", bias=m.bias),
        *_linear("layers.{i}.self_attn.v_proj", "blocks.attention.value", bias=m.bias),
        *_linear("layers.{i}.self_attn.o_proj", "blocks.attention.out", bias=m.bias),
        *_norm("layers.{i}.post_attention_layernorm", "blocks.ffn_norm", bias=False),
        *_linear("layers.{i}.mlp.gate_proj", "blocks.ffn.gate", bias=m.bias),
        *_linear("layers.{i}.mlp.up_proj", "blocks.ffn.up", bias=m.bias),
        *_linear("layers.{i}.mlp.down_proj", "blocks.ffn.down", bias=m.bias),
        *_norm("norm", "final_norm", bias=False),
        *_head(m, "lm_head.weight"),
    ]


def _read_neox(f: Fields) -> config.Model:
    embed, heads = f.need("hidden_size", int, 6144), f.need("num_attention_heads", int, 64)
    context = f.need("max_position_embeddings", int, 2048)
    share = f.take("rotary_pct", float, 0.25)
    rope, newer = read_rope(f, context, "rotary_emb_base")
    share = float(share if newer is None else newer)
    head_dim = max(embed // max(heads, 1), 1)
    if round(head_dim * share) != int(head_dim * share):  # they round down
        share = int(head_dim * share) / head_dim
    f.inert(attention_bias=(True,), rope_theta=(None,))
    return config.Model(
        vocab_size=f.need("vocab_size", int, 1),
        context_length=context,
        num_layers=f.need("num_hidden_layers", int, 44),
        embed_dim=embed,
        num_heads=heads,
        ffn_dim=f.need("intermediate_size", int, 24576),
        ffn=f.choose("hidden_act", ACTIVATIONS, "gelu"),
        positions="rope",
        rope_fraction=share,
        norm_epsilon=f.take("layer_norm_eps", float, 1e-5),
        parallel_residual=f.take("use_parallel_residual", bool, True),
        dropout=_same_rate(f, "hidden_dropout", "attention_dropout", default=0.0),
        init_std=f.take("initializer_range", float, 0.02),
        tie_embeddings=f.take("tie_word_embeddings", bool, False),
        **rope,
    )


def _write_neox(m: config.Model) -> dict[str, Any]:
    turned = round((m.head_dim or 0) * m.rope_fraction)
    exact = int((m.head_dim or 0) * m.rope_fraction) == turned
    return {
        "vocab_size": m.vocab_size,
        "max_position_embeddings": m.context_length,
        "hidden_size": m.embed_dim,
        "intermediate_size": m.ffn_dim,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "hidden_act": _word(ACTIVATIONS, m.ffn),
        "layer_norm_eps": m.norm_epsilon,
        "use_parallel_residual": m.parallel_residual,
        "rotary_pct": m.rope_fraction if exact else (turned + 0.5) / (m.head_dim or 1),
        "hidden_dropout": m.dropout,
        "attention_dropout": m.dropout,
        "initializer_range": m.init_std,
        "tie_word_embeddings": m.tie_embeddings,
        **write_rope(m, "rotary_emb_base"),
    }


def _neox_tensors(m: config.Model) -> list[Tensor]:
    qkv = [f"blocks.attention.{name}" for name in ("query", "key", "value")]
    at = "layers.{i}."
    return [
        Tensor("embed_in.weight", ("embedding.tokens",)),
        *_norm(at + "input_layernorm", "blocks.attention_norm"),
        Tensor(at + "attention.query_key_value.weight", tuple(qkv), linear=True, stacked=-2),
        Tensor(at + "attention.query_key_value.bias", tuple(f"{w}_bias" for w in qkv), linear=True, stacked=-2),
        *_linear(at + "attention.dense", "blocks.attention.out"),
        *_norm(at + "post_attention_layernorm", "blocks.ffn_norm"),
        *_linear(at + "mlp.dense_h_to_4h", "blocks.ffn.up"),
        *_linear(at + "mlp.dense_4h_to_h", "blocks.ffn.down"),
        *_norm("final_layer_norm", "final_norm"),
        *_head(m, "embed_out.weight"),
    ]


def _read_bert(f: Fields) -> config.Model:
    f.inert(position_embedding_type=("absolute",), tie_word_embeddings=(True,))
    f.take("type_vocab_size", int, 2)
    return config.Model(
        vocab_size=f.need("vocab_size", int, 1),
        context_length=f.need("max_position_embeddings", int, 512),
        num_layers=f.need("num_hidden_layers", int, 12),
        embed_dim=f.need("hidden_size", int, 768),
        num_heads=f.need("num_attention_heads", int, 12),
        ffn_dim=f.need("intermediate_size", int, 3072),
        ffn=f.choose("hidden_act", ACTIVATIONS, "gelu"),
        norm_placement="post",
        norm_epsilon=f.take("layer_norm_eps", float, 1e-12),
        embedding_norm=True,
        causal=False,
        head="mlm",
        dropout=_same_rate(f, "hidden_dropout_prob", "attention_probs_dropout_prob", default=0.1),
        init_std=f.take("initializer_range", float, 0.02),
    )


def _bert_tensors(m: config.Model) -> list[Tensor]:
    at = "encoder.layer.{i}."
    return [
        Tensor("embeddings.word_embeddings.weight", ("embedding.tokens",)),
        Tensor("embeddings.position_embeddings.weight", ("embedding.positions",)),
        *_norm("embeddings.LayerNorm", "embedding.norm"),
        *_linear(at + "attention.self.query", "blocks.attention.query"),
        *_linear(at + "attention.self.key", "blocks.attention.key"),
        *_linear(at + "attention.self.value", "blocks.attention.value"),
        *_linear(at + "attention.output.dense", "blocks.attention.out"),
        *_norm(at + "attention.output.LayerNorm", "blocks.attention_norm"),
        *_linear(at + "intermediate.dense", "blocks.ffn.up"),
        *_linear(at + "output.dense", "blocks.ffn.down"),
        *_norm(at + "output.LayerNorm", "blocks.ffn_norm"),
        *_linear("cls.predictions.transform.dense", "embedding.transform"),
        *_norm("cls.predictions.transform.LayerNorm", "embedding.transform_norm"),
        Tensor("cls.predictions.bias", ("embedding.head_bias",)),
    ]


def _norm(theirs: str, ours: str, bias: bool = True) -> list[Tensor]:
    tensors = [Tensor(f"{theirs}.weight", (f"{ours}.scale",)), Tensor(f"{theirs}.bias", (f"{ours}.bias",))]
    return tensors[: 1 + bias]


def _linear(theirs: str, ours: str, bias: bool = True) -> list[Tensor]:
    tensors = [Tensor(f"{theirs}.weight", (ours,), linear=True), Tensor(f"{theirs}.bias", (f"{ours}_bias",))]
    return tensors[: 1 + bias]


def _head(m: config.Model, theirs: str) -> list[Tensor]:
    return [] if m.tie_embeddings else [Tensor(theirs, ("embedding.head",), linear=True)]


def _word(words: dict[str, str], ours: str) -> str:
    """What they call an activation; where they have none, a wrong one, which `inexpressible` then names."""
    return next((theirs for theirs, mine in words.items() if mine == ours), next(iter(words)))


def _same_rate(f: Fields, *names: str, default: float) -> float:
    """Dropout, where all of theirs are the same; else 0, as it has no effect on the logits and gptjax has one for all."""
    rates = {float(f.take(name, float, default)) for name in names}
    return rates.pop() if len(rates) == 1 else 0.0


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "gpt2", "GPT2LMHeadModel", _read_gpt2, _write_gpt2, _gpt2_tensors,
            prefix="transformer.", outside=("lm_head.",), buffers=r"h\.\d+\.attn\.(bias|masked_bias)",
            copies={"lm_head.weight": "wte.weight"},
        ),
        Family(
            "gpt_neox", "GPTNeoXForCausalLM", _read_neox, _write_neox, _neox_tensors,
            prefix="gpt_neox.", outside=("embed_out.",),
            buffers=r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)|rotary_emb\.inv_freq",
            renamed=(("lm_head.weight", "embed_out.weight"),), copies={"embed_out.weight": "embed_in.weight"},
        ),
        Family(
            "llama", "LlamaForCausalLM", _read_llama, _write_llama, _llama_tensors,
            prefix="model.", outside=("lm_head.",),
            buffers=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", copies={"lm_head.weight": "embed_tokens.weight"},
        ),
        Family(
            "bert", "BertForMaskedLM", _read_bert, None, _bert_tensors,
            prefix="bert.", outside=("cls.",),
            buffers=r"embeddings\.(position_ids|token_type_ids)|pooler\..*|cls\.seq_relationship\..*",
            renamed=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
            copies={
                "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            },
            folded={"embeddings.token_type_embeddings.weight": "embeddings.position_embeddings.weight"},
            without_head=": it was saved without its masked-language-model head (from BertModel, perhaps); gptjax reads "
            "BertForMaskedLM",
        ),
    )
}  # fmt: skip


def plain(model: config.Model) -> config.Model:
    """A model resolved, with the usual value of each field that has no effect beside the others; the same logits."""
    m, usual = model.resolved(), config.Model()
    if m.rope_scaling == "ntk":  # nothing but a larger base
        half = round((m.head_dim or 0) * m.rope_fraction) // 2
        grown = m.rope_base * m.rope_factor ** (half / max(0.5, half - 1))
        m = dataclasses.replace(m, rope_base=grown, rope_scaling="none")
    if m.positions != "rope":
        m = dataclasses.replace(m, rope_base=usual.rope_base, rope_scaling="none", rope_fraction=1.0)
    if m.rope_scaling == "none":
        m = dataclasses.replace(m, rope_factor=1.0)
    if m.rope_scaling in ("none", "linear"):
        m = dataclasses.replace(m, rope_original_length=None)
    if m.window is not None and m.causal and m.window >= m.context_length:
        m = dataclasses.replace(m, window=None)
    return dataclasses.replace(m, **{name: getattr(usual, name) for name in NOT_KEPT}).resolved()


def inexpressible(family: Family, model: config.Model) -> dict[str, tuple[Any, Any]]:
    """The fields of a model that a family does not have: name -> (value of the model, what the family would make of it).

    A layernorm or linear layer without biases is one with biases of zero.
    """
    assert family.write is not None
    wanted = plain(model)
    fields = Fields(family.write(wanted))
    got = plain(family.read(fields))
    pairs = {f.name: (getattr(wanted, f.name), getattr(got, f.name)) for f in dataclasses.fields(wanted)}
    different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if different.get("bias") == (False, True):
        del different["bias"]
    if problems := fields.finish():
        different["config.json"] = (problems[0], None)
    return different
