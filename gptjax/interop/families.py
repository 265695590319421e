"""The model families of Hugging Face's transformers that gptjax can import and export.

To add one, write a file with its `Family`: config.json -> `ModelConfig`, `ModelConfig` -> config.json, and the tensor
of each weight. What a family cannot express needs no list: `inexpressible` converts a config there and back, and
reports the fields that change.
"""

import dataclasses
from typing import Any

from gptjax.config import ModelConfig
from gptjax.interop import bert, gpt2, gpt_neox, llama
from gptjax.interop.family import Family
from gptjax.interop.fields import Fields

FAMILIES = {
    f.name: f for f in (gpt2.FAMILY, gpt_neox.FAMILY, llama.FAMILY, bert.FAMILY)
}  # an export uses the first one that can express the model
# How a model is trained and computed, not what it computes: config.json does not have these fields.
NOT_IN_HF = ("init_std", "init_depth_scaled", "dropout", "layers", "remat", "dtype", "attention_kernel")


def normalized(config: ModelConfig) -> ModelConfig:
    """A resolved config with the same logits: fields without effect get their default value."""
    m = config.resolved()
    default = ModelConfig()
    if m.lora_rank == 0:
        m = dataclasses.replace(m, lora_alpha=default.lora_alpha, lora_targets=default.lora_targets)
    if m.rope_scaling == "ntk":  # just a larger base
        half = round((m.head_dim or 0) * m.partial_rotary_factor) // 2
        theta = m.rope_theta * m.rope_factor ** (half / max(0.5, half - 1))
        m = dataclasses.replace(m, rope_theta=theta, rope_scaling="none")
    if m.positions != "rope":
        m = dataclasses.replace(m, rope_theta=default.rope_theta, rope_scaling="none", partial_rotary_factor=1.0)
    if m.rope_scaling == "none":
        m = dataclasses.replace(m, rope_factor=1.0)
    if m.rope_scaling in ("none", "linear"):
        m = dataclasses.replace(m, rope_original_length=None)
    if m.sliding_window is not None and m.causal and m.sliding_window >= m.context_length:
        m = dataclasses.replace(m, sliding_window=None)
    return dataclasses.replace(m, **{name: getattr(default, name) for name in NOT_IN_HF}).resolved()


def differences(config: ModelConfig, other: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """The fields by which two configs compute other logits from the same weights: name -> (value, other value).

    A layer without biases is the same as one with biases of zero.
    """
    a = normalized(config)
    b = normalized(other)
    pairs = {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)}
    different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if different.get("bias") == (False, True):
        del different["bias"]
    return different


def inexpressible(family: Family, config: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """The fields of a config that a family cannot express: name -> (value, value after export and import)."""
    assert family.to_hf_config is not None
    fields = Fields(family.to_hf_config(normalized(config)))
    different = differences(config, family.from_hf_config(fields))
    if problems := fields.finish():
        different["config.json"] = (problems[0], None)
    return different
