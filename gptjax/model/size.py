"""Parameters and FLOPs of a model, computed from its config."""

import functools
import math

import jax

from gptjax.config import ModelConfig
from gptjax.model.gpt import init_params
from gptjax.model.weights import TOKEN_EMBEDDING


@functools.cache  # tracing a model takes 0.1 s, and every log line needs it
def num_params(model: ModelConfig) -> dict[str, int]:
    """Parameters of a model: `total`, and `multiplied`, those in matrix products (6 FLOPs/token each)."""
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    sizes = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for name, part in shapes.items()}
    looked_up = sum(
        math.prod(x.shape)
        for name, x in shapes["embedding"].items()  # type: ignore[union-attr]
        if name == "positions"
        or (name.startswith(TOKEN_EMBEDDING) and (model.num_classes > 0 or not model.tie_embeddings))
    )
    total = sum(sizes.values())
    return {"total": total, "multiplied": total - looked_up}


def flops_per_token(model: ModelConfig) -> float:
    """Training FLOPs/token: 6 N + 12 L D T (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B).

    N: parameters in matrix products (a tied embedding counts once); L layers, D = heads x head_dim, T context length.
    Forward and backward pass. Attention is not halved for causality, and recomputation is not counted.
    """
    m = model.resolved()
    attention = 12 * m.num_layers * m.num_heads * (m.head_dim or 0) * m.context_length
    return 6 * num_params(m)["multiplied"] + attention
