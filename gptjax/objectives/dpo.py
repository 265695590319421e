"""Direct preference optimization (Rafailov et al. 2023)."""

from collections.abc import Iterator
from typing import Any

import jax
from jax import Array

from gptjax.data.batches import Batch
from gptjax.model.gpt import GPT
from gptjax.objectives.base import reference_problems
from gptjax.objectives.losses import Loss, Rngs
from gptjax.objectives.preference import Preference, answer_log_probs, preference_loss
from gptjax.objectives.reference import ReferenceModel


class DPO(Preference):
    """Raises the probability of the chosen answer over the rejected one, relative to the reference model."""

    fields = ("reference", "beta")

    def reference_name(self) -> str | None:
        return self.config.reference or self.experiment.init

    def loss(self, reference: ReferenceModel | None) -> Loss:
        assert reference
        return dpo_loss(reference, self.config.beta)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from reference_problems(self.experiment)
        if self.config.beta == 0:
            yield f"objective.beta = 0: nothing is learned with objective.name = {self.config.name!r}; 0.1 is usual"


def dpo_loss(reference: ReferenceModel, beta: float) -> Loss:
    """-log sigmoid(beta (log-ratio of the chosen answer - log-ratio of the rejected one)), per pair.

    A log-ratio is the log-probability under the model minus that under `reference`.
    """

    def scores(params: Any, batch: Batch, model: GPT, rngs: Rngs, weights: Any) -> Array:
        log_probs = answer_log_probs(params, batch, model, rngs)
        of_reference = answer_log_probs(jax.lax.stop_gradient(weights), batch, reference.gpt, {})
        return beta * (log_probs - of_reference)

    return preference_loss(scores)
