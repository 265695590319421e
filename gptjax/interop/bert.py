"""BERT as a masked language model; import only. Token type 0 is folded into the positions; others are not supported."""

from gptjax.config import ModelConfig
from gptjax.interop.family import ACTIVATIONS, Family, dropout_rate, linear, norm
from gptjax.interop.fields import Fields
from gptjax.interop.layout import Tensor


def _from_hf_config(f: Fields) -> ModelConfig:
    f.inert(position_embedding_type=("absolute",), tie_word_embeddings=(True,))
    f.take("type_vocab_size", int, 2)
    return ModelConfig(
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
        dropout=dropout_rate(f, "hidden_dropout_prob", "attention_probs_dropout_prob", default=0.1),
        init_std=f.take("initializer_range", float, 0.02),
    )


def _tensors(config: ModelConfig) -> list[Tensor]:
    at = "encoder.layer.{i}."
    return [
        Tensor("embeddings.word_embeddings.weight", ("embedding.tokens",)),
        Tensor("embeddings.position_embeddings.weight", ("embedding.positions",)),
        *norm("embeddings.LayerNorm", "embedding.norm"),
        *linear(at + "attention.self.query", "blocks.attention.query"),
        *linear(at + "attention.self.key", "blocks.attention.key"),
        *linear(at + "attention.self.value", "blocks.attention.value"),
        *linear(at + "attention.output.dense", "blocks.attention.out"),
        *norm(at + "attention.output.LayerNorm", "blocks.attention_norm"),
        *linear(at + "intermediate.dense", "blocks.ffn.up"),
        *linear(at + "output.dense", "blocks.ffn.down"),
        *norm(at + "output.LayerNorm", "blocks.ffn_norm"),
        *linear("cls.predictions.transform.dense", "embedding.transform"),
        *norm("cls.predictions.transform.LayerNorm", "embedding.transform_norm"),
        Tensor("cls.predictions.bias", ("embedding.head_bias",)),
    ]


FAMILY = Family(
    "bert",
    "BertForMaskedLM",
    _from_hf_config,
    None,
    _tensors,
    prefix="bert.",
    outside=("cls.",),
    buffers=r"embeddings\.(position_ids|token_type_ids)|pooler\..*|cls\.seq_relationship\..*",
    renamed=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    copies={
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    folded={"embeddings.token_type_embeddings.weight": "embeddings.position_embeddings.weight"},
    without_head=": it was saved without its masked-language-model head (perhaps from BertModel); gptjax reads "
    "BertForMaskedLM",
)
