"""One update of the weights and one evaluation step: pure functions, compiled once for a whole run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from gptjax.data.batches import Batch
from gptjax.model.gpt import GPT
from gptjax.objectives.losses import TOKEN_LOSS, Loss, Metrics
from gptjax.sharding import map_over_cores, sum_over_cores
from gptjax.training.optim import evaluation_params
from gptjax.training.state import RECENT, Health, TrainState, named_key

Scalar = Float[Array, ""]
# (state, [microbatches, rows, length] batch, params of the reference model) -> metrics, and the gradient
GradFn = Callable[[TrainState, Batch, Any], tuple[Metrics, Any]]
# (params, [rows, length] microbatch, random key, params of the reference model, normalizer of the whole batch)
MicrobatchGrad = Callable[[Any, Batch, Array, Any, Array], tuple[Metrics, Any]]


def mean_gradient(model: GPT, loss: Loss, trainable: Any = None) -> GradFn:
    """The gradient of the mean loss of a batch: the same however the batch is divided into microbatches.

    It is 0, and not computed, for weights that are not `trainable` (None: all are).
    """

    def microbatch_grad(
        params: Any, microbatch: Batch, key: Array, reference: Any, normalizer: Array
    ) -> tuple[Metrics, Any]:
        def mean_loss(params: Any) -> tuple[Array, Metrics]:
            total = loss_sums(params, microbatch, model, loss, key, trainable, reference)
            return jax.tree.map(lambda x: x / normalizer, total)

        (_, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        return metrics, grads

    return accumulate(microbatch_grad, loss)


def loss_sums(
    params: Any, batch: Batch, model: GPT, loss: Loss, key: Array, trainable: Any, reference: Any
) -> tuple[Array, Metrics]:
    """`loss.sums` with dropout from `key`, and without a gradient for weights that are not trainable."""
    rngs = {"dropout": key} if model.config.dropout else {}
    return loss.sums(_stop_frozen(params, trainable), batch, model, rngs, reference)


def accumulate(microbatch_grad: MicrobatchGrad, loss: Loss) -> GradFn:
    """The sum of a gradient over the microbatches of a batch, one after the other, and over the cores of a CPU.

    Each microbatch gets a random key of its own. The metrics also have "answers", the normalizer of the batch.
    """

    def grad_fn(state: TrainState, batch: Batch, reference: Any) -> tuple[Metrics, Any]:
        normalizer = loss.normalizer(batch)
        key = jax.random.fold_in(named_key(state.key, "dropout"), state.step)

        def rows_grad(rows: Batch, shared: Any) -> tuple[Metrics, Any]:
            params, reference, key, normalizer = shared

            def grad_of(index: Array | int, microbatch: Batch) -> tuple[Metrics, Any]:
                return microbatch_grad(params, microbatch, jax.random.fold_in(key, index), reference, normalizer)

            return _sum_over_microbatches(grad_of, rows)

        shared = (state.params, reference, key, normalizer)
        metrics, grads = sum_over_cores(rows_grad, batch, shared, batch_axis=1)
        return metrics | {"answers": normalizer}, grads

    return grad_fn


def _sum_over_microbatches(
    grad_of: Callable[[Array | int, Batch], tuple[Metrics, Any]], batch: Batch
) -> tuple[Metrics, Any]:
    first = jax.tree.map(lambda x: x[0], batch)
    microbatches = batch.tokens.shape[0]
    if microbatches == 1:
        return grad_of(0, first)

    def add(total: tuple[Metrics, Any], indexed: tuple[Array, Batch]) -> tuple[tuple[Metrics, Any], None]:
        return jax.tree.map(jnp.add, total, grad_of(*indexed)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(partial(grad_of, 0), first))
    return jax.lax.scan(add, zeros, (jnp.arange(microbatches), batch))[0]


def _stop_frozen(params: Any, trainable: Any) -> Any:
    """The weights, without a gradient for those that are not trainable."""
    if trainable is None or all(jax.tree.leaves(trainable)):
        return params
    return jax.tree.map(lambda x, moves: x if moves else jax.lax.stop_gradient(x), params, trainable)


def train_step(
    state: TrainState,
    batch: Batch,
    reference: Any = None,
    *,
    grad_fn: GradFn,
    tx: optax.GradientTransformation,
    spike_sigma: float | None = None,
    loss_decides: bool = True,
) -> tuple[TrainState, Metrics]:
    """One update from a [microbatches, rows, length] batch.

    The update is skipped, and weights and optimizer state stay as they are, if the loss or the gradient is not finite,
    or if the loss is `spike_sigma` standard deviations above the recent ones. Without `loss_decides` (DP-SGD) only the
    gradient decides, since the loss of a single window must not be revealed; a loss that is not finite still counts as
    skipped.

    Metrics, all scalars: those of the loss ("loss" is in nats/token for most objectives), answers (the normalizer, for
    most the number of targets), grad_norm (before clipping, with the noise of DP-SGD), recent_loss (mean of the recent
    losses), skipped (so far), skipped_in_row.
    """
    metrics, grads = grad_fn(state, batch, reference)
    grad_norm = optax.tree.norm(grads)
    mean_recent, limit = recent_loss(state, spike_sigma)
    healthy = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm) & (metrics["loss"] <= limit)
    take = healthy if loss_decides else jnp.isfinite(grad_norm)

    def update() -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    params, opt_state = jax.lax.cond(take, update, lambda: (state.params, state.opt_state))
    health = _update_health(state, metrics["loss"], healthy)
    metrics |= {"grad_norm": grad_norm, "recent_loss": mean_recent}
    metrics |= {"skipped": health.skipped, "skipped_in_row": health.in_row}
    return TrainState(state.step + 1, params, opt_state, state.key, health), metrics


def recent_loss(state: TrainState, spike_sigma: float | None) -> tuple[Scalar, Scalar]:
    """The mean of the recent losses (infinite before the first), and the loss above which an update is skipped."""
    losses = state.health.losses
    known = losses > 0  # a state of format 1 has taken updates whose losses are not known
    mean = jnp.where(known.any(), losses.sum() / jnp.maximum(known.sum(), 1), jnp.inf)
    if spike_sigma is None:
        return mean, jnp.full((), jnp.inf)
    return mean, jnp.where(known.all(), mean + spike_sigma * losses.std(), jnp.inf)


def _update_health(state: TrainState, loss: Array, healthy: Array) -> Health:
    skipped, in_row, losses = state.health
    with_this = losses.at[(state.step - skipped) % RECENT].set(loss)
    bad = 1 - healthy.astype(jnp.int32)
    return Health(skipped + bad, (in_row + 1) * bad, jnp.where(healthy, with_this, losses))


def eval_step(
    state: TrainState, batch: Batch, reference: Any = None, *, model: GPT, loss: Loss = TOKEN_LOSS
) -> tuple[Metrics, Array]:
    """The metrics of a [rows, length] batch under the weights for evaluation, as sums, and the normalizer.

    Scalars, or on a mesh of cores one number per core: [cores].
    """

    def eval_fn(rows: Batch, shared: Any) -> tuple[Metrics, Array]:
        params, reference = shared
        _, metrics = loss.sums(params, rows, model, {}, reference)
        return metrics, jnp.where((rows.loss_weights > 0).any(), loss.normalizer(rows), 0.0)

    params = evaluation_params(state.params, state.opt_state)
    return map_over_cores(eval_fn, batch, (params, reference), batch_axis=0)
