"""What an objective is beyond its batches: the loss, another model beside the one that learns, texts of its own."""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from gptjax.checks import ON_POLICY
from gptjax.config import Experiment
from gptjax.data.tokenizer import Tokenizer
from gptjax.inference.pretrained import Pretrained
from gptjax.training.step import Loss, class_loss, num_texts, token_loss
from gptjax.tuning.distillation import distillation_loss
from gptjax.tuning.on_policy import Rollout
from gptjax.tuning.preference import preference_loss
from gptjax.tuning.reference import ReferenceModel


@dataclass(frozen=True)
class TrainObjective:
    """How a batch is learnt from."""

    loss: Loss
    reference: ReferenceModel | None = None  # whose weights the loss or the rollout looks at
    rollout: Rollout | None = None  # makes the batches of what the model writes
    of_tokens: bool = False  # whether the loss is that of the true tokens


def make_train_objective(
    experiment: Experiment, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, open_other: Callable[[str], Pretrained]
) -> TrainObjective:
    """The lesson of an experiment. Opens no model yet. Raises `ConfigError` for a score that there is not."""
    o = experiment.objective
    name = reference_name(experiment)
    reference = ReferenceModel(name, lambda: open_other(name), mesh) if name else None
    if o.name == "dpo":
        assert reference
        return TrainObjective(preference_loss(reference, o.beta), reference)
    if o.name == "distill":
        assert reference
        return TrainObjective(distillation_loss(reference, o.divergence), reference, of_tokens=True)
    if o.name in ON_POLICY:
        return TrainObjective(
            token_loss(o.z_loss, num_texts), reference, Rollout(experiment, tokenizer, reference, mesh)
        )
    if experiment.model.num_classes:
        return TrainObjective(class_loss())
    return TrainObjective(token_loss(o.z_loss), of_tokens=True)


def reference_name(experiment: Experiment) -> str | None:
    """The name of the model beside the one that learns; None: the objective needs none."""
    o = experiment.objective
    needed = o.name in ("dpo", "distill") or (o.name in ON_POLICY and o.beta > 0)
    return (o.reference or experiment.init) if needed else None
