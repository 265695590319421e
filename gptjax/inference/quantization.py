"""The matrices of a model in the form that its products want.

In 8 bits every matrix is int8 with one scale for each output, a quarter of the bytes of float32; the activations that
meet it are rounded to 8 bits row by row at run time, so that the products are of integers (LLM.int8 without its
outliers, Dettmers et al. 2022). In bfloat16 on a CPU a matrix lies the other way round. Biases, norms and the table of
positions stay as they are.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from gptjax import config
from gptjax.model import matmul
from gptjax.model.gpt import weight_axes
from gptjax.model.weights import num_inputs


def to_int8(model: config.ModelConfig, params: Any) -> Any:
    """The weights with a `QuantizedMatrix` in the place of every matrix; the token table by rows, so that it can be looked up."""
    return _convert(model, params, matmul.quantize_int8, lambda table: matmul.quantize_int8(table.T, 1))


def turned(model: config.ModelConfig, params: Any) -> Any:
    """The weights with a `Transposed` in the place of every matrix; the token table lies that way already."""
    return _convert(model, params, matmul.transpose_matrix, lambda table: table)


def _convert(
    model: config.ModelConfig, params: Any, matrix: Callable[[Array, int], Any], table: Callable[[Array], Any]
) -> Any:
    def convert(path: tuple[Any, ...], axes: tuple[str, ...], weight: Array) -> Any:
        name = path[-1].key
        if name == "tokens":
            return table(weight)
        own = axes[1:] if axes[0] == "layers" else axes
        if len(own) < 2 or name.endswith(("bias", "scale")) or name == "positions":
            return weight
        one = lambda w: matrix(w, num_inputs(name, own))  # noqa: E731
        return jax.vmap(one)(weight) if axes[0] == "layers" else one(weight)

    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.jit(lambda p: jax.tree.map_with_path(convert, weight_axes(model), p, is_leaf=is_axes))(params)
