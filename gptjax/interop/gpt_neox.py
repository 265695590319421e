"""The GPT-NeoX family (also Pythia): partial RoPE, attention and FFN in parallel."""

from typing import Any

from gptjax.config import ModelConfig
from gptjax.interop.family import ACTIVATIONS, Family, dropout_rate, head, hf_name, linear, norm
from gptjax.interop.fields import Fields
from gptjax.interop.layout import Tensor
from gptjax.interop.rope import read_rope, write_rope


def _from_hf_config(f: Fields) -> ModelConfig:
    embed = f.need("hidden_size", int, 6144)
    heads = f.need("num_attention_heads", int, 64)
    context = f.need("max_position_embeddings", int, 2048)
    share = f.take("rotary_pct", float, 0.25)
    rope, newer = read_rope(f, context, "rotary_emb_base")
    share = float(share if newer is None else newer)
    head_dim = max(embed // max(heads, 1), 1)
    if 0 < share < 1 and round(head_dim * share) != int(head_dim * share):  # transformers rounds down
        share = int(head_dim * share) / head_dim
    f.inert(attention_bias=(True,))
    for name, older, default in [
        ("rope_theta", "rotary_emb_base", 10_000),
        ("partial_rotary_factor", "rotary_pct", 0.25),
    ]:
        if f.take(name, float, None) not in (None, f.values.get(older, default)):  # late 4.x releases wrote both
            f.problem(name, f"{older} has another value")
    return ModelConfig(
        vocab_size=f.need("vocab_size", int, 1),
        context_length=context,
        num_layers=f.need("num_hidden_layers", int, 44),
        embed_dim=embed,
        num_heads=heads,
        ffn_dim=f.need("intermediate_size", int, 24576),
        ffn=f.choose("hidden_act", ACTIVATIONS, "gelu"),
        positions="rope",
        partial_rotary_factor=share,
        norm_epsilon=f.take("layer_norm_eps", float, 1e-5),
        parallel_residual=f.take("use_parallel_residual", bool, True),
        dropout=dropout_rate(f, "hidden_dropout", "attention_dropout", default=0.0),
        init_std=f.take("initializer_range", float, 0.02),
        tie_embeddings=f.take("tie_word_embeddings", bool, False),
        **rope,
    )


def _to_hf_config(config: ModelConfig) -> dict[str, Any]:
    rotary_dim = round((config.head_dim or 0) * config.partial_rotary_factor)
    exact = int((config.head_dim or 0) * config.partial_rotary_factor) == rotary_dim
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": hf_name(ACTIVATIONS, config.ffn),
        "layer_norm_eps": config.norm_epsilon,
        "use_parallel_residual": config.parallel_residual,
        "rotary_pct": config.partial_rotary_factor if exact else (rotary_dim + 0.5) / (config.head_dim or 1),
        "hidden_dropout": config.dropout,
        "attention_dropout": config.dropout,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        **write_rope(config, "rotary_emb_base"),
    }


def _tensors(config: ModelConfig) -> list[Tensor]:
    qkv = [f"blocks.attention.{name}" for name in ("query", "key", "value")]
    at = "layers.{i}."
    return [
        Tensor("embed_in.weight", ("embedding.tokens",)),
        *norm(at + "input_layernorm", "blocks.attention_norm"),
        Tensor(at + "attention.query_key_value.weight", tuple(qkv), linear=True, stacked=-2),
        Tensor(at + "attention.query_key_value.bias", tuple(f"{w}_bias" for w in qkv), linear=True, stacked=-2),
        *linear(at + "attention.dense", "blocks.attention.out"),
        *norm(at + "post_attention_layernorm", "blocks.ffn_norm"),
        *linear(at + "mlp.dense_h_to_4h", "blocks.ffn.up"),
        *linear(at + "mlp.dense_4h_to_h", "blocks.ffn.down"),
        *norm("final_layer_norm", "final_norm"),
        *head(config, "embed_out.weight"),
    ]


FAMILY = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    _from_hf_config,
    _to_hf_config,
    _tensors,
    prefix="gpt_neox.",
    outside=("embed_out.", "lm_head."),
    buffers=r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)|rotary_emb\.inv_freq",
    renamed=(("lm_head.weight", "embed_out.weight"),),
    copies={
        "lm_head.weight": "embed_in.weight",
        "embed_out.weight": "embed_in.weight",
    },  # the module's name today, and the name in files
)
