"""Distillation: the whole distribution over the next token is learnt from a teacher (Hinton et al. 2015)."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.data.objectives import Batch
from gptjax.model.gpt import GPT
from gptjax.training.step import Loss, Metrics, Rngs, batch_logits, num_targets
from gptjax.tuning.reference import ReferenceModel


def distillation_loss(teacher: ReferenceModel, divergence: Literal["forward", "reverse"]) -> Loss:
    """KL(teacher || model), which covers all that the teacher says, or KL(model || teacher), which keeps to its modes
    (Gu et al. 2024); both in nats a token, over the ids that both models have.

    Shows the nats of the true answers as loss, as other objectives do, and the divergence.
    """

    def sums(params: Any, batch: Batch, model: GPT, rngs: Rngs, weights: Any) -> tuple[Array, Metrics]:
        logits = batch_logits(params, batch, model, rngs)
        theirs = batch_logits(jax.lax.stop_gradient(weights), batch, teacher.gpt, {})
        common = min(logits.shape[-1], theirs.shape[-1])  # a table may be padded
        ours, theirs = (jax.nn.log_softmax(x[..., :common]) for x in (logits, theirs))
        first, second = (theirs, ours) if divergence == "forward" else (ours, theirs)
        kl = ((jnp.exp(first) * (first - second)).sum(-1) * batch.loss_weights).sum()
        nats = -jnp.take_along_axis(ours, batch.targets[..., None], -1)[..., 0]
        return kl, {"loss": (nats * batch.loss_weights).sum(), "divergence": kl}

    return Loss(sums, num_targets)
