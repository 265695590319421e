"""What an objective is beyond its batches: the loss, another model beside the one that learns, texts of its own."""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from gptjax.checks import WRITING
from gptjax.config import Experiment
from gptjax.data.tokenizer import Tokenizer
from gptjax.inference.pretrained import Pretrained
from gptjax.training.step import Loss, class_loss, num_texts, token_loss
from gptjax.tuning.distillation import distillation_loss
from gptjax.tuning.other import Other
from gptjax.tuning.preference import preference_loss
from gptjax.tuning.risk import Rollout


@dataclass(frozen=True)
class Lesson:
    """How a batch is learnt from."""

    loss: Loss
    other: Other | None = None  # whose weights the loss or the rollout looks at
    rollout: Rollout | None = None  # makes the batches of what the model writes
    of_tokens: bool = False  # whether the loss is that of the true tokens


def lesson_of(
    experiment: Experiment, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, open_other: Callable[[str], Pretrained]
) -> Lesson:
    """The lesson of an experiment. Opens no model yet. Raises `ConfigError` for a score that there is not."""
    o = experiment.objective
    name = other_of(experiment)
    other = Other(name, lambda: open_other(name), mesh) if name else None
    if o.name == "dpo":
        assert other
        return Lesson(preference_loss(other, o.beta), other)
    if o.name == "distill":
        assert other
        return Lesson(distillation_loss(other, o.divergence), other, of_tokens=True)
    if o.name in WRITING:
        return Lesson(token_loss(o.z_loss, num_texts), other, Rollout(experiment, tokenizer, other, mesh))
    if experiment.model.num_classes:
        return Lesson(class_loss())
    return Lesson(token_loss(o.z_loss), of_tokens=True)


def other_of(experiment: Experiment) -> str | None:
    """The name of the model beside the one that learns; None: the objective needs none."""
    o = experiment.objective
    needed = o.name in ("dpo", "distill") or (o.name in WRITING and o.beta > 0)
    return (o.reference or experiment.init) if needed else None
