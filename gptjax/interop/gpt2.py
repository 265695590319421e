"""The GPT-2 family: learned positions, pre-norm with layernorm, one tensor for query, key and value."""

from typing import Any

from gptjax.config import ModelConfig
from gptjax.interop.family import ACTIVATIONS, Family, dropout_rate, head, hf_name, norm
from gptjax.interop.fields import Fields
from gptjax.interop.layout import Tensor


def _from_hf_config(f: Fields) -> ModelConfig:
    f.inert(scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,))
    f.ignore("reorder_and_upcast_attn")  # no effect in float32
    return ModelConfig(
        vocab_size=f.need("vocab_size", int, 1),
        context_length=f.need("n_positions", int, 1024),
        num_layers=f.need("n_layer", int, 12),
        embed_dim=f.need("n_embd", int, 768),
        num_heads=f.need("n_head", int, 12),
        ffn_dim=f.take("n_inner", int, None),
        ffn=f.choose("activation_function", ACTIVATIONS, "gelu_new"),
        norm_epsilon=f.take("layer_norm_epsilon", float, 1e-5),
        dropout=dropout_rate(f, "resid_pdrop", "embd_pdrop", "attn_pdrop", default=0.1),
        init_std=f.take("initializer_range", float, 0.02),
        tie_embeddings=f.take("tie_word_embeddings", bool, True),
    )


def _to_hf_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.embed_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.ffn_dim,
        "activation_function": hf_name(ACTIVATIONS, config.ffn),
        "layer_norm_epsilon": config.norm_epsilon,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _tensors(config: ModelConfig) -> list[Tensor]:
    def both(theirs: str, *ours: str, stacked: int = 0) -> list[Tensor]:
        """Weight and bias of a Conv1D."""
        kinds = {"weight": "", "bias": "_bias"}
        return [Tensor(f"h.{{i}}.{theirs}.{k}", tuple(f"blocks.{o}{s}" for o in ours), stacked=stacked)
                for k, s in kinds.items()]  # fmt: skip

    return [
        Tensor("wte.weight", ("embedding.tokens",)),
        Tensor("wpe.weight", ("embedding.positions",)),
        *norm("h.{i}.ln_1", "blocks.attention_norm"),
        *both("attn.c_attn", "attention.query", "attention.key", "attention.value", stacked=-3),
        *both("attn.c_proj", "attention.out"),
        *norm("h.{i}.ln_2", "blocks.ffn_norm"),
        *both("mlp.c_fc", "ffn.up"),
        *both("mlp.c_proj", "ffn.down"),
        *norm("ln_f", "final_norm"),
        *head(config, "lm_head.weight"),
    ]


FAMILY = Family(
    "gpt2",
    "GPT2LMHeadModel",
    _from_hf_config,
    _to_hf_config,
    _tensors,
    prefix="transformer.",
    outside=("lm_head.",),
    buffers=r"h\.\d+\.attn\.(bias|masked_bias)",
    copies={"lm_head.weight": "wte.weight"},
)
