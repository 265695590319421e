"""The layout of gptjax weights in the tensors of a Hugging Face file.

In gptjax a matrix is [*in, *out] (`query` is [embed, heads, head_dim]), and the weights of all layers are stacked. In a
file a matrix is [out, in] (torch's `Linear`) or [in, out] (GPT-2's `Conv1D`), query, key and value are one tensor or
three, and each layer has its own tensors.
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
IN_AXES = {"blocks.attention.out": 2}  # input axes of a matrix, if not only the first


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file, and the weights in it."""

    name: str  # in the file, without the family's prefix; "{i}" is the layer
    weights: tuple[str, ...]  # dotted names
    linear: bool = False  # a matrix is [out, in]
    stacked: int = 0  # the axis (from the end) along which several weights [..., heads, head_dim] are stacked

    @property
    def layered(self) -> bool:
        return "{i}" in self.name

    def split(self, array: np.ndarray, shape: Shape) -> Sequence[np.ndarray]:
        """The weights in a tensor, each with the given shape, as views."""
        flat = array.T if self._transposed else array
        if len(self.weights) == 1:
            return [flat.reshape(shape)]
        at = len(shape) + 1 + self.stacked
        return list(np.moveaxis(flat.reshape(*shape[:at], len(self.weights), *shape[at:]), at, 0))

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `split`: a contiguous tensor of weights."""
        shape = arrays[0].shape
        stacked = arrays[0] if len(arrays) == 1 else np.stack(arrays, self.stacked)
        flat = stacked.reshape(self._flat(shape))
        return np.ascontiguousarray(flat.T if self._transposed else flat)

    def shape(self, shape: Shape) -> Shape:
        """The shape of the tensor, given that of each weight."""
        flat = self._flat(shape)
        return flat[::-1] if self._transposed else flat

    @property
    def _transposed(self) -> bool:
        return self.linear and self._matrix

    @property
    def _matrix(self) -> bool:
        return is_matrix(self.weights[0].rpartition(".")[2])

    def _flat(self, shape: Shape) -> Shape:
        """The shape with the input axes merged into one, and the output axes into one."""
        count = len(self.weights)
        if not self._matrix:
            return (count * math.prod(shape),)
        inputs = IN_AXES.get(self.weights[0], 1)
        return (math.prod(shape[:inputs]), count * math.prod(shape[inputs:]))


def weight_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Dotted name -> shape of every weight, without the layer axis."""
    sizes = axis_sizes(config)
    small = dataclasses.replace(
        config, **SMALLEST
    )  # the axes do not depend on sizes, which may be huge in an untrusted file
    axes = jax.tree.leaves_with_path(weight_axes(small), is_leaf=lambda x: isinstance(x, tuple))
    return {leaf_name(path): tuple(sizes[a] for a in names if a != "layers") for path, names in axes}


def nested(weights: dict[str, np.ndarray]) -> dict:
    """Dotted names -> the nested dict of the model."""
    tree: dict = {}
    for name, array in weights.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = array
    return tree
