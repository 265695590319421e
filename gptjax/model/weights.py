"""A weight is declared once: name, named axes, initialiser; its shape and its sharding both follow from the axes."""

import dataclasses
from typing import Any

import flax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from gptjax import config
from gptjax.model.matmul import Int8, LowRank, Transposed

Axes = tuple[str, ...]
TOKEN_EMBEDDING = "tokens"  # the matrix that is looked up: a target of LoRA like the others
LORA_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # within 1 / sqrt(inputs), as in PEFT
NO_DECAY = ("bias", "scale")  # the last word of a name that is no matrix: not decayed, not for Muon


@flax.struct.dataclass
class AxisNamed(meta.AxisMetadata):  # type: ignore[misc]
    """A weight together with the names of its axes, as `init` returns it."""

    value: Any
    axes: Axes = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "AxisNamed":
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "AxisNamed":
        """Called by `nn.scan`, which stacks the weights of the layers along a new axis."""
        return self.replace(axes=(*self.axes[:index], params[nn.PARTITION_NAME], *self.axes[index:]))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "AxisNamed":
        return self.replace(axes=(*self.axes[:index], *self.axes[index + 1 :]))


def axis_sizes(model: config.ModelConfig) -> dict[str, int]:
    """The length of every named axis of a weight."""
    m = model.resolved()
    assert m.vocab_size and m.num_kv_heads and m.head_dim and m.ffn_dim
    return {
        "layers": m.num_layers,
        "embed": m.embed_dim,
        "vocab": m.vocab_size,
        "heads": m.num_heads,
        "kv_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "ffn": m.ffn_dim,
        "positions": m.context_length,
        "features": m.embed_dim,
        "rank": m.lora_rank,
        "classes": m.num_classes,
    }


def declare(module: nn.Module, name: str, axes: Axes, init: nn.initializers.Initializer) -> Any:
    """Declares a float32 weight of a module that has a `config`, and returns it in the dtype of the computation.

    In its place the params may hold the weight in that dtype already, or a matrix in another form. A target of LoRA
    comes with the two small matrices that are learnt beside it.
    """
    given: Any = module.get_variable("params", name) if module.has_variable("params", name) else None
    if isinstance(given, Int8 | Transposed):
        return given
    model: config.ModelConfig = module.config  # type: ignore[attr-defined]
    sizes = axis_sizes(model)
    shape = [sizes[axis] for axis in axes]
    value: Any = module.param(name, lambda key: AxisNamed(init(key, shape, jnp.float32), axes))
    if name.rpartition("_")[2] == "scale":
        return value
    value = value.astype(model.dtype)
    if not model.lora_rank or name not in model.lora_targets:
        return value
    inputs, zeros = num_inputs(name, axes), nn.initializers.zeros
    first, second = (zeros, nn.initializers.normal(1.0)) if name == TOKEN_EMBEDDING else (LORA_INIT, zeros)  # both as in PEFT
    down = declare(module, f"{name}_lora_down", (*axes[:inputs], "rank"), first)
    up = declare(module, f"{name}_lora_up", ("rank", *axes[inputs:]), second)
    return LowRank(value, down, up, model.lora_alpha / model.lora_rank)


def num_inputs(name: str, axes: Axes) -> int:
    """How many of a matrix's axes, those of a layer alone, are summed over in its product."""
    return axes.index("embed") if name == "out" else 1


def merge_lora(model: config.ModelConfig, params: Any) -> tuple[config.ModelConfig, Any]:
    """The same model without LoRA: what was learnt beside a matrix added to it."""
    if not model.lora_rank:
        return model, params
    scale = model.lora_alpha / model.lora_rank

    def merge(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        kept = {name: merge(value) for name, value in part.items() if "_lora_" not in name}
        for name in kept.keys() & set(model.lora_targets):
            down, up = part[f"{name}_lora_down"], part[f"{name}_lora_up"]  # [layers, *in, rank], [layers, rank, *out]
            layers = () if name == TOKEN_EMBEDDING else (len(down),)
            down, up = down.reshape(*layers, -1, model.lora_rank), up.reshape(*layers, model.lora_rank, -1)
            kept[name] = kept[name] + scale * (down @ up).reshape(kept[name].shape)
        return kept

    return dataclasses.replace(model, lora_rank=0), merge(params)


def is_matrix(name: str) -> bool:
    """Whether the weight of this name is decayed: matrices and embeddings are, biases and scales are not."""
    return name.rpartition("_")[2] not in NO_DECAY
