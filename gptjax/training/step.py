"""One update of the weights, and one look at the validation text: pure functions, compiled once for a whole run."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from gptjax.data.objectives import Batch
from gptjax.model import ops
from gptjax.model.chunks import map_in_chunks, num_chunks
from gptjax.model.gpt import GPT
from gptjax.model.kernels import limit_for_backend
from gptjax.sharding import map_over_cores, num_batch_devices, sum_over_cores
from gptjax.training.optim import evaluation_params
from gptjax.training.privacy import DPConfig, add_noise, private_gradient
from gptjax.training.state import RECENT, Health, TrainState, named_key

LOGITS, LOGITS_ON_GPU = 1 << 26, 1 << 29  # float32: 256 MB and 2 GB
Metrics = dict[str, Array]
Rngs = dict[str, Array]


class Loss(NamedTuple):
    """What is learnt from a batch, as sums over [rows, length] parts of it that are divided by a count of the whole."""

    sums: Callable[[Any, Batch, GPT, Rngs, Any], tuple[Array, Metrics]]  # of params, part, model, rngs, other weights:
    # what to minimise, and what to show, "loss" and perhaps more
    counted: Callable[[Batch], Array]  # float32, at least 1; of [..., rows, length]


def batch_loss(params: Any, batch: Batch, model: GPT, z_loss: float, rngs: Rngs) -> tuple[Array, Array]:
    """Weighted sums over a [rows, length] batch: what to minimise, and the plain nats of the answers.

    Of text that the model wrote, what is minimised counts each token by its advantage as well: its gradient is that of
    the expected score, reversed (REINFORCE, Williams 1992).
    """
    nats, log_z = token_nll(params, batch, model, rngs)
    total = (nats * batch.loss_weights).sum()
    minimised = total if batch.advantages is None else (nats * batch.loss_weights * batch.advantages).sum()
    return minimised + z_loss * (jnp.square(log_z) * batch.loss_weights).sum(), total


def token_nll(params: Any, batch: Batch, model: GPT, rngs: Rngs) -> tuple[Array, Array]:
    """-ln of the probability of each target, and the log of the sum that normalises it: float32 [rows, length].

    No more than `LOGITS` logits exist at once on a device. Where that takes parts, each is made again for the gradient.
    """
    reads = (batch.tokens, batch.positions, batch.segment_ids, batch.prefix_mask)
    x: Any = model.apply({"params": params}, *reads, rngs=rngs, method="hidden_states")
    rows, length, _ = x.shape

    def of(part: tuple[Array, Array]) -> tuple[Array, Array]:
        x, targets = part
        logits: Any = model.apply({"params": params}, x, method="logits")
        return ops.cross_entropy(logits, targets)

    assert model.config.vocab_size
    chunks = num_chunks(
        length, rows * model.config.vocab_size // num_batch_devices(), limit_for_backend(LOGITS, LOGITS_ON_GPU)
    )
    nats, log_z = map_in_chunks(of if chunks == 1 else jax.checkpoint(of), (x, batch.targets), chunks, axis=1)
    return nats, log_z


def batch_logits(params: Any, batch: Batch, model: GPT, rngs: Rngs) -> Array:
    """What the model says at each place of a [rows, length] batch: float32 [rows, length, vocab]."""
    reads = (batch.tokens, batch.positions, batch.segment_ids, batch.prefix_mask)
    logits: Any = model.apply({"params": params}, *reads, rngs=rngs)
    return logits


def num_targets(batch: Batch) -> Array:
    """The sum of the weights, or 1 where there are none."""
    return jnp.maximum(batch.loss_weights.sum(), 1.0)


def num_texts(batch: Batch) -> Array:
    """The rows in which anything is asked for, or 1 where there are none."""
    return jnp.maximum((batch.loss_weights > 0).any(-1).sum().astype(jnp.float32), 1.0)


def token_loss(z_loss: float = 0.0, counted: Callable[[Batch], Array] = num_targets) -> Loss:
    """Nats of the answers: a token, or with `num_texts` a text."""

    def sums(params: Any, batch: Batch, model: GPT, rngs: Rngs, reference: Any) -> tuple[Array, Metrics]:
        minimised, nats = batch_loss(params, batch, model, z_loss, rngs)
        return minimised, {"loss": nats}

    return Loss(sums, counted)


TOKENS = token_loss()


def class_loss() -> Loss:
    """Nats of the labels, and as accuracy how many of them are the likeliest."""

    def sums(params: Any, batch: Batch, model: GPT, rngs: Rngs, reference: Any) -> tuple[Array, Metrics]:
        logits = batch_logits(params, batch, model, rngs)
        nats = (ops.cross_entropy(logits, batch.targets)[0] * batch.loss_weights).sum()
        return nats, {"loss": nats, "accuracy": ((logits.argmax(-1) == batch.targets) * batch.loss_weights).sum()}

    return Loss(sums, num_targets)


def loss_and_gradient(
    state: TrainState,
    batch: Batch,
    model: GPT,
    loss: Loss,
    learnt: Any = None,
    reference: Any = None,
    noise: DPConfig | None = None,
) -> tuple[Metrics, Any]:
    """What a loss shows of a [microbatches, rows, length] batch, and the gradient of what it minimises.

    The gradient is 0, and not computed, for weights that are not `learnt` (None: all are). `reference`: the weights of
    another model, for a loss that looks at one. With `noise` each window's mean is minimised by itself, its gradient is
    clipped, and the noise is added to what is learnt.
    """
    num_chunks = loss.counted(batch)
    key = jax.random.fold_in(named_key(state.key, "dropout"), state.step)

    def of_rows(rows: Batch, whole: Any) -> tuple[Metrics, Any]:
        params, reference, key, num_chunks = whole

        def sums(params: Any, part: Batch, key: Array) -> tuple[Array, Metrics]:
            rngs = {"dropout": key} if model.config.dropout else {}
            return loss.sums(_held(params, learnt), part, model, rngs, reference)

        def over_batch(params: Any, part: Batch, key: Array) -> tuple[Array, Metrics]:
            return jax.tree.map(lambda x: x / num_chunks, sums(params, part, key))

        def over_window(params: Any, window: Batch, key: Array) -> tuple[Array, Metrics]:
            minimised, shown = sums(params, window, key)
            return minimised / loss.counted(window), jax.tree.map(lambda x: x / num_chunks, shown)

        def of_part(index: Array | int, part: Batch) -> tuple[Metrics, Any]:
            own = jax.random.fold_in(key, index)
            if noise is not None:
                return private_gradient(over_window, params, part, own, noise)
            (_, shown), grads = jax.value_and_grad(over_batch, has_aux=True)(params, part, own)
            return shown, grads

        return _over_parts(of_part, rows)

    shown, grads = sum_over_cores(of_rows, batch, (state.params, reference, key, num_chunks), batch_axis=1)
    if noise is None:
        return shown, grads
    noisy = add_noise(grads, state.step, noise)
    return shown, noisy if learnt is None else jax.tree.map(lambda x, n, moves: n if moves else x, grads, noisy, learnt)


def _over_parts(of_part: Callable[[Array | int, Batch], tuple[Metrics, Any]], batch: Batch) -> tuple[Metrics, Any]:
    """The sum over microbatches, one after the other."""
    first = jax.tree.map(lambda x: x[0], batch)
    microbatches = batch.tokens.shape[0]
    if microbatches == 1:
        return of_part(0, first)

    def add(total: tuple[Metrics, Any], part: tuple[Array, Batch]) -> tuple[tuple[Metrics, Any], None]:
        return jax.tree.map(jnp.add, total, of_part(*part)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(partial(of_part, 0), first))
    return jax.lax.scan(add, zeros, (jnp.arange(microbatches), batch))[0]


def _held(params: Any, learnt: Any) -> Any:
    """The weights, of which those that are not learnt have no gradient."""
    if learnt is None or all(jax.tree.leaves(learnt)):
        return params
    return jax.tree.map(lambda x, moves: x if moves else jax.lax.stop_gradient(x), params, learnt)


def train_step(
    state: TrainState,
    batch: Batch,
    reference: Any = None,
    *,
    model: GPT,
    tx: optax.GradientTransformation,
    loss: Loss = TOKENS,
    spike_sigma: float | None = None,
    learnt: Any = None,
    noise: DPConfig | None = None,
) -> tuple[TrainState, Metrics]:
    """One update from a [microbatches, rows, length] batch; the same update however the batch is cut into microbatches.

    Where loss or gradient are not finite, or the loss lies `spike_sigma` sigma above the recent ones, the batch is left
    behind: weights and optimiser stay as they are. With `noise` (DP-SGD) the loss does not decide, as that would tell
    of a window: what is not finite is worth nothing in the sum, and counts as skipped.

    Metrics, scalars: what the loss shows (mostly: loss, nats a token), grad_norm (before clipping, with the noise),
    answers (what it counts, for most the sum of the weights), usual_loss (the mean of the recent ones), skipped (so
    far), skipped_in_row.
    """
    shown, grads = loss_and_gradient(state, batch, model, loss, learnt, reference, noise)
    grad_norm = optax.tree.norm(grads)
    usual, limit = usual_loss(state, spike_sigma)
    sound = jnp.isfinite(shown["loss"]) & jnp.isfinite(grad_norm) & (shown["loss"] <= limit)
    good = sound if noise is None else jnp.isfinite(grad_norm)

    def update() -> tuple[Any, Any]:
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    params, opt_state = jax.lax.cond(good, update, lambda: (state.params, state.opt_state))
    health = _examined(state, shown["loss"], sound)
    metrics = shown | {
        "grad_norm": grad_norm,
        "answers": loss.counted(batch),
        "usual_loss": usual,
        "skipped": health.skipped,
        "skipped_in_row": health.in_row,
    }
    return TrainState(state.step + 1, params, opt_state, state.key, health), metrics


def usual_loss(state: TrainState, spike_sigma: float | None) -> tuple[Array, Array]:
    """The mean of the recent losses (infinite before there are any), and the loss above which an update is skipped."""
    losses = state.health.losses
    known = losses > 0  # a state of format 1 has taken updates of which the loss is not known
    mean = jnp.where(known.any(), losses.sum() / jnp.maximum(known.sum(), 1), jnp.inf)
    if spike_sigma is None:
        return mean, jnp.full((), jnp.inf)
    return mean, jnp.where(known.all(), mean + spike_sigma * losses.std(), jnp.inf)


def _examined(state: TrainState, loss: Array, good: Array) -> Health:
    """What is known of the run's health after an update that was `good`, or was skipped."""
    skipped, in_row, losses = state.health
    with_this = losses.at[(state.step - skipped) % RECENT].set(loss)
    bad = 1 - good.astype(jnp.int32)
    return Health(skipped + bad, (in_row + 1) * bad, jnp.where(good, with_this, losses))


def eval_step(
    state: TrainState, batch: Batch, reference: Any = None, *, model: GPT, loss: Loss = TOKENS
) -> tuple[Metrics, Array]:
    """What a loss shows of a [rows, length] batch under the weights to evaluate with, as sums, and its count.

    Scalars, or on a mesh of cores one for each: [cores].
    """

    def look(rows: Batch, whole: Any) -> tuple[Metrics, Array]:
        params, reference = whole
        _, shown = loss.sums(params, rows, model, {}, reference)
        return shown, jnp.where((rows.loss_weights > 0).any(), loss.counted(rows), 0.0)

    return map_over_cores(look, batch, (evaluation_params(state.params, state.opt_state), reference), batch_axis=0)
