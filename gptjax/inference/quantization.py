"""The weight matrices in the form that the matmuls of inference want: int8, or transposed.

int8: every matrix has one scale per output and takes a quarter of the bytes of float32. Activations are quantised row
by row at run time, so that the matmuls are of integers (LLM.int8 without its outliers, Dettmers et al. 2022).
bfloat16 on a CPU: matrices are transposed. Biases, norms and the table of positions stay as they are.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from gptjax.config import ModelConfig
from gptjax.model.gpt import Params, weight_axes
from gptjax.model.matmul import quantize_int8, transpose_matrix
from gptjax.model.weights import num_inputs


def quantize_params(config: ModelConfig, params: Params) -> Params:
    """Replaces every matrix by a `QuantizedMatrix`; the token table has a scale per row, for its lookup."""
    return _convert(config, params, quantize_int8, lambda table: quantize_int8(table.T, 1))


def transpose_for_cpu(config: ModelConfig, params: Params) -> Params:
    """Replaces every matrix by a `Transposed`; the token table is stored that way already."""
    return _convert(config, params, transpose_matrix, lambda table: table)


def _convert(
    config: ModelConfig,
    params: Params,
    convert_matrix: Callable[[Array, int], Any],
    convert_token_table: Callable[[Array], Any],
) -> Params:
    def convert(path: tuple[Any, ...], axes: tuple[str, ...], weight: Array) -> Any:
        name = path[-1].key
        if name == "tokens":
            return convert_token_table(weight)
        is_stacked = axes[0] == "layers"
        layer_axes = axes[1:] if is_stacked else axes
        if len(layer_axes) < 2 or name.endswith(("bias", "scale")) or name == "positions":
            return weight
        convert_one = lambda w: convert_matrix(w, num_inputs(name, layer_axes))  # noqa: E731
        return jax.vmap(convert_one)(weight) if is_stacked else convert_one(weight)

    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.jit(lambda p: jax.tree.map_with_path(convert, weight_axes(config), p, is_leaf=is_axes))(params)
