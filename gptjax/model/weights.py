"""A weight is declared once: name, named axes, initializer. Its shape and its sharding follow from the axes."""

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Any

import flax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from gptjax.config import ModelConfig
from gptjax.model.axes import Axes, axis_sizes
from gptjax.model.matmul import LowRank, QuantizedMatrix, Transposed

TOKEN_EMBEDDING = "tokens"  # the matrix of token embeddings; it can be a target of LoRA like the others
LORA_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # within 1 / sqrt(inputs), as in PEFT
NO_DECAY = ("bias", "scale")  # last words of names of weights that are no matrices: no weight decay, no Muon


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


def declare(module: nn.Module, name: str, axes: Axes, init: nn.initializers.Initializer) -> Any:
    """Declares a float32 weight of a module that has a `config`, and returns it in the dtype of the computation.

    The params may also hold the weight in that dtype, or a `QuantizedMatrix` or `Transposed`. For a target of LoRA the
    two low-rank matrices are declared too, and the result is a `LowRank`.
    """
    stored: Any = module.get_variable("params", name) if module.has_variable("params", name) else None
    if isinstance(stored, QuantizedMatrix | Transposed):
        return stored
    config: ModelConfig = module.config  # type: ignore[attr-defined]
    sizes = axis_sizes(config)
    shape = [sizes[axis] for axis in axes]
    value = jnp.asarray(module.param(name, lambda key: AxisNamed(init(key, shape, jnp.float32), axes)))
    if name.rpartition("_")[2] == "scale":
        return value
    value = value.astype(config.dtype)
    if not config.lora_rank or name not in config.lora_targets:
        return value
    inputs, zeros = num_inputs(name, axes), nn.initializers.zeros
    if name == TOKEN_EMBEDDING:  # both cases as in PEFT
        init_a, init_b = zeros, nn.initializers.normal(1.0)
    else:
        init_a, init_b = LORA_INIT, zeros
    lora_a = declare(module, f"{name}_lora_down", (*axes[:inputs], "rank"), init_a)
    lora_b = declare(module, f"{name}_lora_up", ("rank", *axes[inputs:]), init_b)
    return LowRank(value, lora_a, lora_b, config.lora_alpha / config.lora_rank)


def num_inputs(name: str, axes: Axes) -> int:
    """How many axes of a matrix are summed over in its product; `axes` without "layers"."""
    return axes.index("embed") if name == "out" else 1


def merge_lora(config: ModelConfig, params: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """The same model without LoRA: the low-rank updates are added to the matrices."""
    if not config.lora_rank:
        return config, params
    scale = config.lora_alpha / config.lora_rank

    def merge(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        merged = {name: merge(value) for name, value in part.items() if "_lora_" not in name}
        for name in merged.keys() & set(config.lora_targets):
            a, b = part[f"{name}_lora_down"], part[f"{name}_lora_up"]  # [layers, *in, rank], [layers, rank, *out]
            layers = () if name == TOKEN_EMBEDDING else (len(a),)
            a, b = a.reshape(*layers, -1, config.lora_rank), b.reshape(*layers, config.lora_rank, -1)
            merged[name] = merged[name] + scale * (a @ b).reshape(merged[name].shape)
        return merged

    return dataclasses.replace(config, lora_rank=0), merge(params)


def is_matrix(name: str) -> bool:
    """Whether a weight with this name gets weight decay: matrices and embeddings do, biases and scales do not."""
    return name.rpartition("_")[2] not in NO_DECAY


def in_output_head(path: Sequence[str]) -> bool:
    """Whether a weight belongs to the output head for tokens, which is stored under "embedding"."""
    return path[0] == "embedding" and path[1].startswith(("head", "transform"))


def matches(pattern: str, path: Sequence[str]) -> bool:
    """Whether a pattern such as "blocks.ffn.*" matches the dotted name of a weight.

    The weights of the output head have names that begin with "head." here, so that "embedding.*" matches only the
    embeddings. A pattern that names the head as it is stored, "embedding.head" for instance, matches it too.
    """
    name = ".".join(path)
    if in_output_head(path) and not pattern.startswith(("embedding.head", "embedding.transform")):
        name = ".".join(["head", *path[1:]])
    return fnmatch.fnmatch(name, pattern)
