"""One update of the weights, and one look at the validation text: pure functions, compiled once for a whole run."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from gptjax.data.objectives import Batch
from gptjax.model import ops
from gptjax.model.gpt import GPT
from gptjax.training.optim import evaluation_params
from gptjax.training.state import TrainState, named_key

Metrics = dict[str, Array]


def batch_loss(params: Any, batch: Batch, model: GPT, z_loss: float, rngs: dict[str, Array]) -> tuple[Array, Array]:
    """Weighted sums over a [rows, length] batch: what to minimise, and the plain nats of the answers."""
    logits: Any = model.apply({"params": params}, batch.tokens, batch.positions, batch.segments, rngs=rngs)
    nats, log_z = ops.cross_entropy(logits, batch.targets)
    total = (nats * batch.weights).sum()
    return total + z_loss * (jnp.square(log_z) * batch.weights).sum(), total


def train_step(
    state: TrainState, batch: Batch, *, model: GPT, tx: optax.GradientTransformation, z_loss: float = 0.0
) -> tuple[TrainState, Metrics]:
    """One update from a [microbatches, rows, length] batch; the same update however the batch is cut into microbatches.

    Metrics, float32 scalars: loss (nats a token), grad_norm (before clipping), answers (the sum of the weights).
    """
    answers = jnp.maximum(batch.weights.sum(), 1.0)
    key = jax.random.fold_in(named_key(state.key, "dropout"), state.step)
    gradient = jax.value_and_grad(
        lambda params, part, rngs: jax.tree.map(lambda x: x / answers, batch_loss(params, part, model, z_loss, rngs)),
        has_aux=True,
    )

    def of_part(index: Array | int, part: Batch) -> tuple[Array, Any]:
        rngs = {"dropout": jax.random.fold_in(key, index)} if model.config.dropout else {}
        (_, loss), grads = gradient(state.params, part, rngs)
        return loss, grads

    microbatches = batch.tokens.shape[0]
    if microbatches == 1:
        loss, grads = of_part(0, jax.tree.map(lambda x: x[0], batch))
    else:

        def add(total: tuple[Array, Any], part: tuple[Array, Batch]) -> tuple[tuple[Array, Any], None]:
            return jax.tree.map(jnp.add, total, of_part(*part)), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        (loss, grads), _ = jax.lax.scan(add, zeros, (jnp.arange(microbatches), batch))

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "answers": answers}
    return TrainState(state.step + 1, params, opt_state, state.key), metrics


def eval_step(state: TrainState, batch: Batch, *, model: GPT) -> tuple[Array, Array]:
    """Nats of the answers of a [rows, length] batch under the weights to evaluate with, and how many answers."""
    params = evaluation_params(state.params, state.opt_state)
    _, total = batch_loss(params, batch, model, 0.0, {})
    return total, batch.weights.sum()
