"""8-bit weights: every matrix of a model as int8 with one scale for each output, a quarter of the bytes of float32.

The activations that meet them are rounded to 8 bits row by row at run time, so that the products are of integers
(LLM.int8 without its outliers, Dettmers et al. 2022). Biases, norms and the table of positions stay as they are.
"""

from typing import Any

import jax
from jax import Array

from gptjax import config
from gptjax.model.gpt import weight_axes
from gptjax.model.ops import quantise


def to_int8(model: config.Model, params: Any) -> Any:
    """The weights with an `Int8` in the place of every matrix; the token table by rows, so that it can be looked up."""

    def convert(path: tuple[Any, ...], axes: tuple[str, ...], weight: Array) -> Any:
        name = path[-1].key
        if name == "tokens":
            return quantise(weight.T, 1)
        own = axes[1:] if axes[0] == "layers" else axes
        if len(own) < 2 or name.endswith(("bias", "scale")) or name == "positions":
            return weight
        summed = own.index("embed") if name == "out" else 1
        one = lambda w: quantise(w, summed)  # noqa: E731
        return jax.vmap(one)(weight) if axes[0] == "layers" else one(weight)

    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.jit(lambda p: jax.tree.map_with_path(convert, weight_axes(model), p, is_leaf=is_axes))(params)
