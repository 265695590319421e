"""How one tensor of a Hugging Face file holds weights of gptjax: transposed or not, several in one or not.

In gptjax a matrix is [*in, *out] (`query` is [embed, heads, head_dim]), and the weights of all layers are stacked. In a
file it is [out, in] as in torch's `Linear`, or [in, out] as in GPT-2's `Conv1D`, with queries, keys and values in one
tensor or apart, and each layer by itself.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from gptjax.config import ModelConfig
from gptjax.model.axes import axis_sizes
from gptjax.model.gpt import weight_axes
from gptjax.model.weights import is_matrix
from gptjax.training.state import leaf_name

Shape = tuple[int, ...]
SIZES = ("vocab_size", "context_length", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")
SMALLEST: dict[str, Any] = dict.fromkeys(SIZES, 1) | dict(embed_dim=2, head_dim=2, partial_rotary_factor=1.0)
IN_AXES = {"blocks.attention.out": 2}  # axes that a matrix sums over, where that is not the first one only


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file, and the weights that are in it."""

    name: str  # as in the file, without the prefix of the family; "{i}" stands for the number of the layer
    weights: tuple[str, ...]  # dotted names
    linear: bool = False  # [out, in], where it is a matrix
    stacked: int = 0  # the axis from the end along which several weights [..., heads, head_dim] lie in it

    @property
    def layered(self) -> bool:
        return "{i}" in self.name

    def split(self, array: np.ndarray, shape: Shape) -> Sequence[np.ndarray]:
        """The weights in a tensor, each of a shape, as views."""
        flat = array.T if self._transposed else array
        if len(self.weights) == 1:
            return [flat.reshape(shape)]
        at = len(shape) + 1 + self.stacked
        return list(np.moveaxis(flat.reshape(*shape[:at], len(self.weights), *shape[at:]), at, 0))

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor that holds weights, in memory of its own order: what `split` takes apart."""
        shape = arrays[0].shape
        whole = arrays[0] if len(arrays) == 1 else np.stack(arrays, self.stacked)
        flat = whole.reshape(self._flat(shape))
        return np.ascontiguousarray(flat.T if self._transposed else flat)

    def shape(self, shape: Shape) -> Shape:
        """The shape of a tensor whose weights each have a shape."""
        flat = self._flat(shape)
        return flat[::-1] if self._transposed else flat

    @property
    def _transposed(self) -> bool:
        return self.linear and self._matrix

    @property
    def _matrix(self) -> bool:
        return is_matrix(self.weights[0].rpartition(".")[2])

    def _flat(self, shape: Shape) -> Shape:
        """The axes that go in as one, and those that come out as one."""
        name, count = self.weights[0], len(self.weights)
        if not self._matrix:
            return (count * math.prod(shape),)
        inputs = IN_AXES.get(name, 1)
        return (math.prod(shape[:inputs]), count * math.prod(shape[inputs:]))


def weight_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Dotted name -> shape of every weight of a model, without the axis of the layers."""
    sizes = axis_sizes(model)
    small = dataclasses.replace(model, **SMALLEST)  # the axes are the same, whatever sizes a stranger's file asks for
    axes = jax.tree.leaves_with_path(weight_axes(small), is_leaf=lambda x: isinstance(x, tuple))
    return {leaf_name(path): tuple(sizes[a] for a in names if a != "layers") for path, names in axes}


def nested(weights: dict[str, np.ndarray]) -> dict:
    """Dotted names -> the nested dict that the model takes."""
    tree: dict = {}
    for name, array in weights.items():
        *path, last = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = array
    return tree
