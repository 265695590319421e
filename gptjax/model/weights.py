"""A weight is declared once: name, named axes, initialiser; its shape and its sharding both follow from the axes."""

from typing import Any

import flax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from gptjax import config
from gptjax.model.ops import Int8

Axes = tuple[str, ...]
UNDECAYED = ("bias", "scale")  # the last word of a name that is no matrix: not decayed, not for Muon


@flax.struct.dataclass
class Declared(meta.AxisMetadata):  # type: ignore[misc]
    """A weight together with the names of its axes, as `init` returns it."""

    value: Any
    axes: Axes = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Declared":
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Declared":
        """Called by `nn.scan`, which stacks the weights of the layers along a new axis."""
        return self.replace(axes=(*self.axes[:index], params[nn.PARTITION_NAME], *self.axes[index:]))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Declared":
        return self.replace(axes=(*self.axes[:index], *self.axes[index + 1 :]))


def axis_sizes(model: config.Model) -> dict[str, int]:
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
    }


def declare(module: nn.Module, name: str, axes: Axes, init: nn.initializers.Initializer) -> Any:
    """Declares a float32 weight of a module that has a `config`, and returns it in the dtype of the computation.

    In its place the params may hold the weight in that dtype already, or a matrix in 8 bits.
    """
    given: Any = module.get_variable("params", name) if module.has_variable("params", name) else None
    if isinstance(given, Int8):
        return given
    model: config.Model = module.config  # type: ignore[attr-defined]
    sizes = axis_sizes(model)
    shape = [sizes[axis] for axis in axes]
    value: Any = module.param(name, lambda key: Declared(init(key, shape, jnp.float32), axes))
    return value if name.rpartition("_")[2] == "scale" else value.astype(model.dtype)


def is_matrix(name: str) -> bool:
    """Whether the weight of this name is decayed: matrices and embeddings are, biases and scales are not."""
    return name.rpartition("_")[2] not in UNDECAYED
