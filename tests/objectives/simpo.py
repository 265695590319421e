"""SimPO (Meng et al. 2024), an objective outside gptjax: `objective.name = "simpo:SimPO"`.

Like DPO, but the score of an answer is its mean log-probability, so that it needs no reference model.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from gptjax.data.batches import Batch
from gptjax.model.gpt import GPT
from gptjax.objectives.losses import Loss, Rngs
from gptjax.objectives.preference import Preference, answer_log_probs, preference_loss
from gptjax.objectives.reference import ReferenceModel


class SimPO(Preference):
    """-log sigmoid(beta (mean log-prob of the chosen answer - that of the rejected one) - gamma)."""

    fields = ("beta",)
    gamma = 0.5

    def loss(self, reference: ReferenceModel | None) -> Loss:
        beta = self.config.beta

        def scores(params: Any, batch: Batch, model: GPT, rngs: Rngs, weights: Any) -> Array:
            lengths = jnp.maximum(batch.loss_weights.sum(-1), 1)
            return beta * answer_log_probs(params, batch, model, rngs) / lengths

        return preference_loss(scores, margin=self.gamma)
