"""What objectives on pairs of answers share: of each pair one answer is chosen and one is rejected."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from gptjax.data.batches import Batch, MakeBatch
from gptjax.data.tokenizer import Tokenizer
from gptjax.model.gpt import GPT
from gptjax.objectives.base import Group, Objective
from gptjax.objectives.losses import Loss, Metrics, Rngs, num_rows, token_nll
from gptjax.objectives.sft import answer_batch

# params, batch, model, rngs and the reference's params -> for each row a number, higher for a better answer: [rows]
AnswerScores = Callable[[Any, Batch, GPT, Rngs, Any], Array]


class Preference(Objective):
    """Rows come in pairs: the chosen answer, then the rejected one."""

    fields: ClassVar[tuple[str, ...]] = ()
    needs_answers = True
    reads_rejected = True

    def group(self) -> Group:
        return Group(rows=2, examples=2)

    def batch_maker(self, tokenizer: Tokenizer) -> MakeBatch:
        return answer_batch

    def is_token_nll(self) -> bool:
        return False

    def problems(self) -> Iterator[str]:
        name, t = self.config.name, self.experiment.train
        if self.experiment.data.rejected is None:
            yield f"objective.name = {name!r}: compares two answers; set data.rejected"
        if t.batch_size % (2 * t.microbatches):
            yield (
                f"train.batch_size = {t.batch_size}: objective.name = {name!r} reads 2 rows together, in every "
                "microbatch; choose a multiple"
            )


def preference_loss(scores: AnswerScores, margin: float = 0.0) -> Loss:
    """-log sigmoid(score of the chosen answer - score of the rejected one - margin), per pair (Bradley-Terry).

    Metrics: loss, and accuracy, the fraction of pairs whose chosen answer has the higher score.
    """

    def sums(params: Any, batch: Batch, model: GPT, rngs: Rngs, weights: Any) -> tuple[Array, Metrics]:
        chosen, rejected = scores(params, batch, model, rngs, weights).reshape(-1, 2).T
        exists = (batch.loss_weights > 0).any(-1).reshape(-1, 2).all(-1)  # the last validation batch may be padded
        difference = chosen - rejected
        loss = jnp.where(exists, jax.nn.softplus(margin - difference), 0.0).sum()
        accuracy = (exists & (difference > 0)).sum().astype(jnp.float32)
        return loss, {"loss": loss, "accuracy": accuracy}

    return Loss(sums, lambda batch: jnp.maximum(num_rows(batch) / 2, 1.0))


def answer_log_probs(params: Any, batch: Batch, model: GPT, rngs: Rngs) -> Array:
    """The log-probability of each row's answer: float32 [rows]."""
    nll, _ = token_nll(params, batch, model, rngs)
    return -(nll * batch.loss_weights).sum(-1)
