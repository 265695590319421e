"""The families of models that Hugging Face's transformers has and gptjax can be.

To add one: a file with how its config.json becomes a `ModelConfig`, how a `ModelConfig` becomes one, and where each weight lies.
What a family cannot express needs no list: `inexpressible` writes a model's settings, reads them again and names what
has changed.
"""

import dataclasses
from typing import Any

from gptjax.config import ModelConfig
from gptjax.interop import bert, gpt2, gpt_neox, llama
from gptjax.interop.family import Family
from gptjax.interop.fields import Fields

FAMILIES = {f.name: f for f in (gpt2.FAMILY, gpt_neox.FAMILY, llama.FAMILY, bert.FAMILY)}  # the first that can, writes
# How a model is trained and computed, not what it computes: no family keeps these.
NOT_KEPT = ("init_std", "init_depth_scaled", "dropout", "layers", "remat", "dtype", "attention_kernel")


def plain(config: ModelConfig) -> ModelConfig:
    """A model resolved, with the usual value of each field that has no effect beside the others; the same logits."""
    m, usual = model.resolved(), ModelConfig()
    if m.lora_rank == 0:
        m = dataclasses.replace(m, lora_alpha=usual.lora_alpha, lora_targets=usual.lora_targets)
    if m.rope_scaling == "ntk":  # nothing but a larger base
        half = round((m.head_dim or 0) * m.partial_rotary_factor) // 2
        grown = m.rope_theta * m.rope_factor ** (half / max(0.5, half - 1))
        m = dataclasses.replace(m, rope_theta=grown, rope_scaling="none")
    if m.positions != "rope":
        m = dataclasses.replace(m, rope_theta=usual.rope_theta, rope_scaling="none", partial_rotary_factor=1.0)
    if m.rope_scaling == "none":
        m = dataclasses.replace(m, rope_factor=1.0)
    if m.rope_scaling in ("none", "linear"):
        m = dataclasses.replace(m, rope_original_length=None)
    if m.sliding_window is not None and m.causal and m.sliding_window >= m.context_length:
        m = dataclasses.replace(m, sliding_window=None)
    return dataclasses.replace(m, **{name: getattr(usual, name) for name in NOT_KEPT}).resolved()


def differences(config: ModelConfig, other: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """The fields that make two models compute other logits from weights of the same names: name -> (one, the other).

    A layernorm or linear layer without biases is one with biases of zero.
    """
    wanted, got = plain(model), plain(other)
    pairs = {f.name: (getattr(wanted, f.name), getattr(got, f.name)) for f in dataclasses.fields(wanted)}
    different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if different.get("bias") == (False, True):
        del different["bias"]
    return different


def inexpressible(family: Family, config: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """The fields of a model that a family does not have: name -> (the model's value, what would come back)."""
    assert family.write is not None
    fields = Fields(family.write(plain(model)))
    different = differences(model, family.read(fields))
    if problems := fields.finish():
        different["config.json"] = (problems[0], None)
    return different
