"""Distillation: learn a teacher's distribution over the next token (Hinton et al. 2015)."""

from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.data.batches import Batch, MakeBatch
from gptjax.data.tokenizer import Tokenizer
from gptjax.model.gpt import GPT
from gptjax.objectives.base import Objective
from gptjax.objectives.losses import Loss, Metrics, Rngs, batch_logits, num_targets
from gptjax.objectives.reference import ReferenceModel
from gptjax.objectives.sft import answer_or_text_batch


class Distill(Objective):
    """Predicts the teacher's distribution, at the tokens of the answers or of all the text."""

    fields = ("reference", "divergence")

    def reference_name(self) -> str | None:
        return self.config.reference or self.experiment.init

    def batch_maker(self, tokenizer: Tokenizer) -> MakeBatch:
        return answer_or_text_batch

    def loss(self, reference: ReferenceModel | None) -> Loss:
        assert reference
        return distillation_loss(reference, self.config.divergence)

    def problems(self) -> Iterator[str]:
        if self.config.reference is None:
            yield "objective.name = 'distill': there is no teacher; name one by objective.reference"


def distillation_loss(teacher: ReferenceModel, divergence: Literal["forward", "reverse"]) -> Loss:
    """KL(teacher || student), which covers the teacher's distribution, or KL(student || teacher), which seeks its
    modes (Gu et al. 2024), in nats/token, over the ids that both models have.

    Metrics: loss, the NLL of the true tokens as in other objectives, and divergence.
    """

    def sums(params: Any, batch: Batch, model: GPT, rngs: Rngs, weights: Any) -> tuple[Array, Metrics]:
        student = batch_logits(params, batch, model, rngs)
        target = batch_logits(jax.lax.stop_gradient(weights), batch, teacher.gpt, {})
        common = min(student.shape[-1], target.shape[-1])  # an embedding may be padded
        student, target = (jax.nn.log_softmax(x[..., :common]) for x in (student, target))
        first, second = (target, student) if divergence == "forward" else (student, target)
        kl = ((jnp.exp(first) * (first - second)).sum(-1) * batch.loss_weights).sum()
        nll = -jnp.take_along_axis(student, batch.targets[..., None], -1)[..., 0]
        return kl, {"loss": (nll * batch.loss_weights).sum(), "divergence": kl}

    return Loss(sums, num_targets)
