"""A model set up to generate: its weights layer by layer in the dtype of the computation, on the device."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax import Array

from gptjax import config
from gptjax.errors import PromptError
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.quantise import to_int8
from gptjax.model.gpt import layers_apart

NUMBERS = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Engine:
    """What the loops that generate need of a model."""

    model: config.Model
    params: Any  # of `layers_apart`; matrices in `model.dtype`, or in 8 bits
    vocab: int  # ids below this are tokens

    @property
    def rows(self) -> int:
        """How many logits the model has."""
        assert self.model.vocab_size
        return self.model.vocab_size

    @property
    def weight_bytes(self) -> int:
        """What one step has to read of the weights: all but the tables that are only looked up in."""
        size = sum(x.nbytes for x in jax.tree.leaves(self.params))
        embedding = self.params["embedding"]
        looked_up = ["positions"] + ["tokens"] * (not self.model.tie_embeddings)
        return size - sum(x.nbytes for name in looked_up for x in jax.tree.leaves(embedding.get(name)))


def make_engine(pretrained: Pretrained, numbers: str | None = None) -> Engine:
    """`numbers`: float32 or bfloat16 for weights and computation, or int8 for 8-bit weights and activations (None: the
    model's own dtype). Raises `PromptError` for a model that cannot generate.
    """
    model = pretrained.model
    if not model.causal:
        raise PromptError(f"{pretrained.name}: every token sees the whole text (model.causal = False): cannot generate")
    if numbers is not None and numbers not in NUMBERS:
        raise PromptError(f"dtype = {numbers!r}: must be one of {', '.join(NUMBERS)}")
    if numbers in ("float32", "bfloat16"):
        model = dataclasses.replace(model, dtype=cast(Literal["float32", "bfloat16"], numbers))
    if model.attention_kernel == "cudnn":
        model = dataclasses.replace(model, attention_kernel="auto")
    params = jax.tree.map(jnp.asarray, pretrained.params)
    if numbers == "int8":
        params = to_int8(model, params)
    return Engine(model, _ready(params, dtype=model.dtype), pretrained.tokenizer.vocab_size)


@partial(jax.jit, static_argnames="dtype")
def _ready(params: Any, dtype: str) -> Any:
    """The layers apart, every matrix and bias in `dtype`; scales stay float32, as the norms take them."""

    def convert(path: tuple[Any, ...], x: Array) -> Array:
        name = str(getattr(path[-1], "key", getattr(path[-1], "name", "")))
        return x if x.dtype == jnp.int8 or name.endswith("scale") else x.astype(dtype)

    return layers_apart(jax.tree.map_with_path(convert, params))
