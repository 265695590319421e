"""A second model whose probabilities an objective needs: the teacher, or the reference of a preference objective."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import sharding
from gptjax.config import names_of_format_1
from gptjax.inference.pretrained import Pretrained
from gptjax.model.gpt import GPT, weight_axes


class ReferenceModel:
    """A frozen model, opened when it is first needed and placed on the mesh once."""

    def __init__(self, name: str, open_model: Callable[[], Pretrained], mesh: jax.sharding.Mesh):
        self.name, self._open, self.mesh = name, open_model, mesh

    @functools.cached_property
    def pretrained(self) -> Pretrained:
        """Raises `GptjaxError` if it cannot be opened."""
        return self._open()

    @property
    def gpt(self) -> GPT:
        """Apply it without an rng for dropout."""
        return GPT(self.pretrained.model)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of its config and weights, on which the trained weights depend."""
        shape = ", ".join(f"{name}={x!r}" for name, x in names_of_format_1("model", self.pretrained.model).items())
        digest = hashlib.sha256(f"Model({shape})".encode())
        for x in jax.tree.leaves(self.pretrained.params):
            digest.update(np.asarray(x, np.float32).tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def params(self) -> Any:
        """Its weights on the devices, in float32."""

        def place(axes: tuple[str, ...], x: Any) -> jax.Array:
            return jax.device_put(jnp.asarray(x, jnp.float32), sharding.named_sharding(axes, x.shape, self.mesh))

        axes = weight_axes(self.pretrained.model)
        return jax.tree.map(place, axes, self.pretrained.params, is_leaf=lambda x: isinstance(x, tuple))
