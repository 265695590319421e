"""A model set up to generate: its weights layer by layer in the dtype of the computation, on the device."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gptjax import config
from gptjax.errors import PromptError
from gptjax.inference.pretrained import Pretrained, check_is_generative
from gptjax.inference.quantization import to_int8, turned
from gptjax.model.gpt import unstack_layers

NUMBERS = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Engine:
    """What the loops that generate need of a model."""

    model: config.ModelConfig
    params: Any  # of `unstack_layers`; matrices in `model.dtype`, or in 8 bits
    vocab: int  # ids below this are tokens

    @property
    def rows(self) -> int:
        """How many logits the model has."""
        assert self.model.vocab_size
        return self.model.vocab_size

    @property
    def narrow(self) -> bool:
        """Whether its products are of bfloat16 or of 8-bit numbers."""
        matrix = self.params["blocks"][0]["attention"]["query"]
        return jax.tree.leaves(matrix)[0].dtype != jnp.float32

    @property
    def weight_bytes(self) -> int:
        """What one step has to read of the weights: all but the tables that are only looked up in."""
        size = sum(x.nbytes for x in jax.tree.leaves(self.params))
        embedding = self.params["embedding"]
        looked_up = ["positions"] + ["tokens"] * (not self.model.tie_embeddings)
        return size - sum(x.nbytes for name in looked_up for x in jax.tree.leaves(embedding.get(name)))


def make_engine(pretrained: Pretrained, numbers: str | None = None) -> Engine:
    """Sets a model up as `set_up` does. Raises `PromptError` for a model that cannot generate."""
    check_is_generative(pretrained)
    if not pretrained.model.causal:
        raise PromptError(f"{pretrained.name}: every token sees the whole text (model.causal = False): cannot generate")
    model, params = set_up(pretrained, numbers)
    return Engine(model, jax.jit(unstack_layers)(params), pretrained.tokenizer.vocab_size)


def set_up(pretrained: Pretrained, numbers: str | None = None) -> tuple[config.ModelConfig, Any]:
    """A model as it is computed with, and its weights on the device: the numbers that its products want.

    `numbers`: float32 or bfloat16 for weights and computation, or int8 for 8-bit weights and activations (None: the
    model's own dtype). Biases of products come in the same dtype; scales stay float32, as the norms take them.
    """
    plain: dict[str, Any] = {"dropout": 0.0, "remat": "none"}
    if numbers is not None and numbers not in NUMBERS:
        raise PromptError(f"dtype = {numbers!r}: must be one of {', '.join(NUMBERS)}")
    if numbers in ("float32", "bfloat16"):
        plain["dtype"] = numbers
    if pretrained.model.attention_kernel == "cudnn":  # which need not be on this machine
        plain["attention_kernel"] = "auto"
    model = dataclasses.replace(pretrained.model, **plain)
    params = jax.tree.map(jnp.asarray, pretrained.params)
    if numbers == "int8":
        params = to_int8(model, params)
    params = _in_dtype(params, model.dtype)
    narrow = numbers != "int8" and model.dtype == "bfloat16" and jax.default_backend() == "cpu"
    return model, turned(model, params) if narrow else params


@partial(jax.jit, static_argnames="dtype")
def _in_dtype(params: Any, dtype: str) -> Any:
    def convert(path: tuple[Any, ...], x: Array) -> Array:
        name = str(getattr(path[-1], "key", getattr(path[-1], "name", "")))
        return x if x.dtype == jnp.int8 or name.endswith("scale") else x.astype(dtype)

    return jax.tree.map_with_path(convert, params)
