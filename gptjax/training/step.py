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
from gptjax.training.state import RECENT, Health, TrainState, named_key

Metrics = dict[str, Array]


def batch_loss(params: Any, batch: Batch, model: GPT, z_loss: float, rngs: dict[str, Array]) -> tuple[Array, Array]:
    """Weighted sums over a [rows, length] batch: what to minimise, and the plain nats of the answers."""
    logits: Any = model.apply({"params": params}, batch.tokens, batch.positions, batch.segments, rngs=rngs)
    nats, log_z = ops.cross_entropy(logits, batch.targets)
    total = (nats * batch.weights).sum()
    return total + z_loss * (jnp.square(log_z) * batch.weights).sum(), total


def loss_and_gradient(state: TrainState, batch: Batch, model: GPT, z_loss: float = 0.0) -> tuple[Array, Any]:
    """Nats a token of a [microbatches, rows, length] batch, and the gradient of what is minimised."""
    answers = _answers(batch)
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
        return of_part(0, jax.tree.map(lambda x: x[0], batch))

    def add(total: tuple[Array, Any], part: tuple[Array, Batch]) -> tuple[tuple[Array, Any], None]:
        return jax.tree.map(jnp.add, total, of_part(*part)), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    return jax.lax.scan(add, zeros, (jnp.arange(microbatches), batch))[0]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: GPT,
    tx: optax.GradientTransformation,
    z_loss: float = 0.0,
    skip_spikes: float | None = None,
) -> tuple[TrainState, Metrics]:
    """One update from a [microbatches, rows, length] batch; the same update however the batch is cut into microbatches.

    Where loss or gradient are not finite, or the loss lies `skip_spikes` sigma above the recent ones, the batch is left
    behind: weights and optimiser stay as they are. Metrics, scalars: loss (nats a token), grad_norm (before clipping),
    answers (the sum of the weights), usual_loss (the mean of the recent ones), skipped (so far), skipped_in_row.
    """
    loss, grads = loss_and_gradient(state, batch, model, z_loss)
    grad_norm = optax.tree.norm(grads)
    usual, limit = usual_loss(state, skip_spikes)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (loss <= limit)

    def update() -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    params, opt_state = jax.lax.cond(good, update, lambda: (state.params, state.opt_state))
    health = _examined(state, loss, good)
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "answers": _answers(batch),
        "usual_loss": usual,
        "skipped": health.skipped,
        "skipped_in_row": health.in_row,
    }
    return TrainState(state.step + 1, params, opt_state, state.key, health), metrics


def usual_loss(state: TrainState, skip_spikes: float | None) -> tuple[Array, Array]:
    """The mean of the recent losses (infinite before there are any), and the loss above which an update is skipped."""
    losses = state.health.losses
    known = losses > 0  # a state of format 1 has taken updates of which the loss is not known
    mean = jnp.where(known.any(), losses.sum() / jnp.maximum(known.sum(), 1), jnp.inf)
    if skip_spikes is None:
        return mean, jnp.full((), jnp.inf)
    return mean, jnp.where(known.all(), mean + skip_spikes * losses.std(), jnp.inf)


def _examined(state: TrainState, loss: Array, good: Array) -> Health:
    """What is known of the run's health after an update that was `good`, or was skipped."""
    skipped, in_row, losses = state.health
    with_this = losses.at[(state.step - skipped) % RECENT].set(loss)
    bad = 1 - good.astype(jnp.int32)
    return Health(skipped + bad, (in_row + 1) * bad, jnp.where(good, with_this, losses))


def _answers(batch: Batch) -> Array:
    return jnp.maximum(batch.weights.sum(), 1.0)


def eval_step(state: TrainState, batch: Batch, *, model: GPT) -> tuple[Array, Array]:
    """Nats of the answers of a [rows, length] batch under the weights to evaluate with, and how many answers."""
    params = evaluation_params(state.params, state.opt_state)
    _, total = batch_loss(params, batch, model, 0.0, {})
    return total, batch.weights.sum()
