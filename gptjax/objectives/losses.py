"""Losses: of tokens, and of class labels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from gptjax.data.batches import Batch
from gptjax.model import ops
from gptjax.model.chunks import map_in_chunks, num_chunks
from gptjax.model.gpt import GPT
from gptjax.model.kernels import limit_for_backend
from gptjax.sharding import num_batch_devices

LOGITS, LOGITS_ON_GPU = 1 << 26, 1 << 29  # float32: 256 MB and 2 GB
Metrics = dict[str, Array]
Rngs = dict[str, Array]
TokenFloats = Float[Array, "rows length"]
Scalar = Float[Array, ""]


class Loss(NamedTuple):
    """The loss of a batch: a sum over its rows, divided by a normalizer of the whole batch."""

    # (params, [rows, length] batch, model, rngs, params of the reference model)
    # -> what is minimized, and the metrics: "loss" and perhaps others; all are sums
    sums: Callable[[Any, Batch, GPT, Rngs, Any], tuple[Array, Metrics]]
    normalizer: Callable[[Batch], Array]  # of [..., rows, length]: float32, at least 1


def batch_loss(params: Any, batch: Batch, model: GPT, z_loss: float, rngs: Rngs) -> tuple[Scalar, Scalar]:
    """Weighted sums over a [rows, length] batch: what is minimized, and the negative log-likelihood of the targets.

    If the batch has advantages (answers sampled from the model), each token's loss is multiplied by its advantage. The
    gradient is then that of the expected reward, with the opposite sign (REINFORCE, Williams 1992).
    """
    nll, log_z = token_nll(params, batch, model, rngs)
    total = (nll * batch.loss_weights).sum()
    if batch.advantages is None:
        minimized = total
    else:
        minimized = (nll * batch.loss_weights * batch.advantages).sum()
    return minimized + z_loss * (jnp.square(log_z) * batch.loss_weights).sum(), total


def token_nll(params: Any, batch: Batch, model: GPT, rngs: Rngs) -> tuple[TokenFloats, TokenFloats]:
    """-ln of the probability of each target, and log Z, the logarithm of the softmax's normalizer.

    At most `LOGITS` logits exist at once on a device. If they take several chunks, each is recomputed in the backward
    pass.
    """
    inputs = (batch.tokens, batch.positions, batch.segment_ids, batch.prefix_mask)
    hidden: Any = model.apply({"params": params}, *inputs, rngs=rngs, method="hidden_states")
    rows, length, _ = hidden.shape

    def chunk_nll(chunk: tuple[Array, Array | np.ndarray]) -> tuple[Array, Array]:
        hidden, targets = chunk
        logits: Any = model.apply({"params": params}, hidden, method="logits")
        return ops.cross_entropy(logits, targets)

    assert model.config.vocab_size
    logits_per_token = rows * model.config.vocab_size // num_batch_devices()
    chunks = num_chunks(length, logits_per_token, limit_for_backend(LOGITS, LOGITS_ON_GPU))
    function = chunk_nll if chunks == 1 else jax.checkpoint(chunk_nll)
    nll, log_z = map_in_chunks(function, (hidden, batch.targets), chunks, axis=1)
    return nll, log_z


def batch_logits(params: Any, batch: Batch, model: GPT, rngs: Rngs) -> Float[Array, "rows length outputs"]:
    """The logits of a [rows, length] batch."""
    inputs = (batch.tokens, batch.positions, batch.segment_ids, batch.prefix_mask)
    logits: Any = model.apply({"params": params}, *inputs, rngs=rngs)
    return logits


def num_targets(batch: Batch) -> Scalar:
    """The sum of the loss weights, or 1 if there are none."""
    return jnp.maximum(batch.loss_weights.sum(), 1.0)


def num_rows(batch: Batch) -> Scalar:
    """The number of rows with a target, or 1 if there are none."""
    return jnp.maximum((batch.loss_weights > 0).any(-1).sum().astype(jnp.float32), 1.0)


def token_loss(z_loss: float = 0.0, normalizer: Callable[[Batch], Array] = num_targets) -> Loss:
    """Cross-entropy of the targets, per token, or with `num_rows` per row."""

    def sums(params: Any, batch: Batch, model: GPT, rngs: Rngs, reference: Any) -> tuple[Array, Metrics]:
        minimized, nll = batch_loss(params, batch, model, z_loss, rngs)
        return minimized, {"loss": nll}

    return Loss(sums, normalizer)


TOKEN_LOSS = token_loss()


def class_loss() -> Loss:
    """Cross-entropy of the labels, and the accuracy."""

    def sums(params: Any, batch: Batch, model: GPT, rngs: Rngs, reference: Any) -> tuple[Array, Metrics]:
        logits = batch_logits(params, batch, model, rngs)
        nll = (ops.cross_entropy(logits, batch.targets)[0] * batch.loss_weights).sum()
        return nll, {"loss": nll, "accuracy": ((logits.argmax(-1) == batch.targets) * batch.loss_weights).sum()}

    return Loss(sums, num_targets)
