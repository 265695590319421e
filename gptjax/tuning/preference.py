"""Direct preference optimisation (Rafailov et al. 2023): of two answers to a prompt, make the better one likelier."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.data.objectives import Batch
from gptjax.model.gpt import GPT
from gptjax.training.step import Loss, Metrics, Rngs, num_texts, token_nll
from gptjax.tuning.reference import ReferenceModel


def preference_loss(reference: ReferenceModel, beta: float) -> Loss:
    """-ln sigmoid(beta (log-ratio of the better answer - log-ratio of the worse)), a pair.

    A log-ratio is that of an answer's probability under the model to that under `reference`, where training starts.
    Rows come in pairs, the better answer first. Shows the loss, and as accuracy the share of pairs whose better answer
    has the larger log-ratio.
    """

    def sums(params: Any, batch: Batch, model: GPT, rngs: Rngs, weights: Any) -> tuple[Array, Metrics]:
        ours = _log_probability(params, batch, model, rngs)
        theirs = _log_probability(jax.lax.stop_gradient(weights), batch, reference.gpt, {})
        better, worse = (ours - theirs).reshape(-1, 2).T
        there = (batch.loss_weights > 0).any(-1).reshape(-1, 2).all(-1)  # the last batch of validation may be padded
        margin = beta * (better - worse)
        loss = jnp.where(there, jax.nn.softplus(-margin), 0.0).sum()
        return loss, {"loss": loss, "accuracy": (there & (margin > 0)).sum().astype(jnp.float32)}

    return Loss(sums, lambda batch: jnp.maximum(num_texts(batch) / 2, 1.0))


def _log_probability(params: Any, batch: Batch, model: GPT, rngs: Rngs) -> Array:
    """ln of the probability of each row's answer: float32 [rows]."""
    nats, _ = token_nll(params, batch, model, rngs)
    return -(nats * batch.loss_weights).sum(-1)
