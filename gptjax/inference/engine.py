"""A model prepared for generation: unstacked weights in the dtype of the computation, on the device."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.config import ModelConfig
from gptjax.errors import PromptError
from gptjax.inference.pretrained import Pretrained, check_is_generative
from gptjax.inference.quantization import quantize_params, transpose_for_cpu
from gptjax.model.gpt import Params, unstack_layers

DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Engine:
    """The model as the decoding loops use it."""

    config: ModelConfig
    params: Params  # of `unstack_layers`; matrices in `config.dtype` or in int8
    vocab_size: int  # ids below this are tokens

    @property
    def padded_vocab_size(self) -> int:
        """The number of logits: `vocab_size` and the padding of the token table."""
        assert self.config.vocab_size
        return self.config.vocab_size

    @property
    def low_precision(self) -> bool:
        """Whether its matmuls are in bfloat16 or int8."""
        matrix = self.params["blocks"][0]["attention"]["query"]
        return jax.tree.leaves(matrix)[0].dtype != jnp.float32

    @property
    def weight_bytes(self) -> int:
        """The bytes of weights that a decoding step reads: all except the tables that are only looked up in."""
        size = sum(x.nbytes for x in jax.tree.leaves(self.params))
        embedding = self.params["embedding"]
        lookup_tables = ["positions"] + ["tokens"] * (not self.config.tie_embeddings)
        return size - sum(x.nbytes for name in lookup_tables for x in jax.tree.leaves(embedding.get(name)))


def make_engine(pretrained: Pretrained, dtype: str | None = None) -> Engine:
    """Prepares a model as `prepare_for_inference` does. Raises `PromptError` for a model that cannot generate."""
    check_is_generative(pretrained)
    if not pretrained.model.causal:
        raise PromptError(
            f"{pretrained.name}: cannot generate text, because its attention is bidirectional (model.causal = False); "
            "use a causal model"
        )
    config, params = prepare_for_inference(pretrained, dtype)
    return Engine(config, jax.jit(unstack_layers)(params), pretrained.tokenizer.vocab_size)


def prepare_for_inference(pretrained: Pretrained, dtype: str | None = None) -> tuple[ModelConfig, Params]:
    """The config without dropout and remat, and the weights on the device in the dtype of the matmuls.

    `dtype`: float32 or bfloat16 for weights and computation, or int8 for 8-bit weights and activations (None: the
    model's own). Biases have the same dtype; the scales of norms stay in float32.
    """
    changes: dict[str, Any] = {"dropout": 0.0, "remat": "none"}
    if dtype is not None and dtype not in DTYPES:
        raise PromptError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")
    if dtype in ("float32", "bfloat16"):
        changes["dtype"] = dtype
    if pretrained.model.attention_kernel == "cudnn":  # may be missing on this machine
        changes["attention_kernel"] = "auto"
    config = dataclasses.replace(pretrained.model, **changes)
    params = jax.tree.map(jnp.asarray, pretrained.params)
    if dtype == "int8":
        return config, _cast(quantize_params(config, params), config.dtype)
    params = _cast(params, config.dtype)
    if config.dtype == "bfloat16" and jax.default_backend() == "cpu":
        params = transpose_for_cpu(config, params)
    return config, params


@partial(jax.jit, static_argnames="dtype")
def _cast(params: Params, dtype: str) -> Params:
    def convert(path: tuple[Any, ...], x: Array) -> Array:
        name = str(getattr(path[-1], "key", getattr(path[-1], "name", "")))
        return x if x.dtype == jnp.int8 or name.endswith("scale") else x.astype(dtype)

    return jax.tree.map_with_path(convert, params)
