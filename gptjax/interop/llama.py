"""The Llama family (1 to 3): RoPE, rmsnorm, a gated FFN, grouped-query attention."""

from typing import Any

from gptjax.config import ModelConfig
from gptjax.interop.family import Family, head, hf_name, linear, norm
from gptjax.interop.fields import Fields
from gptjax.interop.layout import Tensor
from gptjax.interop.rope import read_rope, write_rope

GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}


def _from_hf_config(f: Fields) -> ModelConfig:
    context = f.need("max_position_embeddings", int, 2048)
    rope, share = read_rope(f, context)
    if share not in (None, 1):
        f.problems.append(f"partial_rotary_factor = {share}: Llama applies RoPE to whole heads, so 1 was expected")
    bias = f.take("attention_bias", bool, False)
    if f.take("mlp_bias", bool, False) != bias:
        f.problem("mlp_bias", f"attention_bias is {bias}; gptjax has biases in all linear layers or in none")
    f.take("attention_dropout", float, 0.0)  # gptjax applies dropout in more places, so it stays 0
    f.ignore("pretraining_tp")  # the same matmuls, split
    f.inert(rope_interleaved=(False,))
    return ModelConfig(
        vocab_size=f.need("vocab_size", int, 1),
        context_length=context,
        num_layers=f.need("num_hidden_layers", int, 32),
        embed_dim=f.need("hidden_size", int, 4096),
        num_heads=f.need("num_attention_heads", int, 32),
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


def _to_hf_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": hf_name(GATED, config.ffn),
        "rms_norm_eps": config.norm_epsilon,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        **write_rope(config),
    }


def _tensors(config: ModelConfig) -> list[Tensor]:
    return [
        Tensor("embed_tokens.weight", ("embedding.tokens",)),
        *norm("layers.{i}.input_layernorm", "blocks.attention_norm", bias=False),
        *linear("layers.{i}.self_attn.q_proj", "blocks.attention.query", bias=config.bias),
        *linear("layers.{i}.self_attn.k_proj", "blocks.attention.key", bias=config.bias),
        *linear("layers.{i}.self_attn.v_proj", "blocks.attention.value", bias=config.bias),
        *linear("layers.{i}.self_attn.o_proj", "blocks.attention.out", bias=config.bias),
        *norm("layers.{i}.post_attention_layernorm", "blocks.ffn_norm", bias=False),
        *linear("layers.{i}.mlp.gate_proj", "blocks.ffn.gate", bias=config.bias),
        *linear("layers.{i}.mlp.up_proj", "blocks.ffn.up", bias=config.bias),
        *linear("layers.{i}.mlp.down_proj", "blocks.ffn.down", bias=config.bias),
        *norm("norm", "final_norm", bias=False),
        *head(config, "lm_head.weight"),
    ]


FAMILY = Family(
    "llama",
    "LlamaForCausalLM",
    _from_hf_config,
    _to_hf_config,
    _tensors,
    prefix="model.",
    outside=("lm_head.",),
    buffers=r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    copies={"lm_head.weight": "embed_tokens.weight"},
)
