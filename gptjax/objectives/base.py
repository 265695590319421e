"""What an objective is: how windows become batches, the loss, and the rules for an experiment that uses it.

An objective is a class in a file of its own. One outside gptjax is named by `objective.name = "module:Class"`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from gptjax.config import Experiment
from gptjax.data.batches import Batch, MakeBatch
from gptjax.data.tokenizer import Tokenizer
from gptjax.inference.pretrained import Pretrained
from gptjax.objectives.losses import Loss, token_loss
from gptjax.objectives.reference import ReferenceModel

TOKEN_SPELLINGS = {  # extra token -> how tokenizers spell it: BERT, RoBERTa, StarCoder, Qwen
    "mask": ("[MASK]", "<mask>"),
    "classify": ("[CLS]",),
    "separate": ("[SEP]",),
    "prefix": ("<fim_prefix>", "<|fim_prefix|>"),
    "suffix": ("<fim_suffix>", "<|fim_suffix|>"),
    "middle": ("<fim_middle>", "<|fim_middle|>"),
}


class Group(NamedTuple):
    """Rows of a batch that belong together. (0, 0): rows are independent."""

    rows: int = 0
    examples: int = 0  # examples from which these rows are made


@runtime_checkable
class Rollout(Protocol):
    """Replaces batches by answers that the model samples (see on_policy.py)."""

    def __call__(self, params: Any, batch: Batch, step: int) -> tuple[Batch, dict[str, float]]:
        """The batch of the update from `step` to step + 1, and metrics."""

    def prompts(self, rows: Batch) -> list[Any]:
        """The prompts of a [rows, length] batch."""

    def sample(self, params: Any, prompts: Any, key: tuple[int, ...]) -> list[Any]:
        """An answer to each prompt."""

    def rewards(self, prompts: Any, samples: Any) -> np.ndarray:
        """The reward of each answer."""


class Objective:
    """One objective, for one experiment. Subclasses define `batch_maker`, and override what differs."""

    fields: ClassVar[tuple[str, ...]] = ("z_loss",)  # fields of ObjectiveConfig that it reads, besides `name`
    needs_answers: ClassVar[bool] = False  # the data must be examples with answers
    reads_rejected: ClassVar[bool] = False  # uses data.rejected
    predicts_classes: ClassVar[bool] = False  # can train a classification head
    bidirectional: ClassVar[bool] = False  # trains a model with model.causal = False
    masks_plain_text: ClassVar[bool] = False  # restricts attention in text without documents or examples as well

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.config = experiment.objective

    def batch_maker(self, tokenizer: Tokenizer) -> MakeBatch:
        """A pure function that makes windows into a batch."""
        raise NotImplementedError

    def loss(self, reference: ReferenceModel | None) -> Loss:
        """The loss; `reference` is the model called `reference_name()`."""
        return token_loss(self.config.z_loss)

    def is_token_nll(self) -> bool:
        """Whether the metric "loss" is the NLL of the target tokens."""
        return True

    def problems(self) -> Iterator[str]:
        """A message for each rule that the experiment breaks, if these rules are of this objective only."""
        yield from ()

    def group(self) -> Group:
        """How many rows of a batch belong together."""
        return Group()

    def needs_negatives(self) -> bool:
        """Whether batches are made from a second set of random windows as well."""
        return False

    def extra_tokens(self) -> tuple[str, ...]:
        """Names of the tokens it adds to the vocabulary. They are inputs and targets, and are never sampled."""
        return ()

    def reference_name(self) -> str | None:
        """The run or model that the loss or the rollout needs besides the trained model."""
        return None

    def rollout(
        self, tokenizer: Tokenizer, reference: ReferenceModel | None, mesh: jax.sharding.Mesh
    ) -> Rollout | None:
        """What replaces a batch by answers that the model samples; None for an objective that trains on the data."""
        return None

    def masks_tokens(self) -> bool:
        """Whether batches restrict attention further than the model does: to a document, or by a prefix."""
        e = self.experiment
        return e.data.document_mask or e.with_answers or self.masks_plain_text


def room_problems(experiment: Experiment) -> Iterator[str]:
    """The rule of objectives that add tokens to a window: there must be room for text as well."""
    length = experiment.model.context_length
    if length < 8:
        yield (
            f"model.context_length = {length}: objective.name = {experiment.objective.name!r} adds tokens, which "
            "leave no room for text; choose 8 or more"
        )


def reference_problems(experiment: Experiment) -> Iterator[str]:
    """The rule of objectives whose reference model is objective.reference or else init."""
    o = experiment.objective
    if experiment.init is None and o.reference is None:
        yield f"objective.name = {o.name!r}: needs a reference model; name one by init or by objective.reference"


def extra_ids(names: tuple[str, ...], tokenizer: Tokenizer) -> list[int]:
    """The ids of extra tokens: the tokenizer's own if it has them, else those after its last id."""
    ids = []
    for number, name in enumerate(names):
        own = [word for word in TOKEN_SPELLINGS.get(name, ()) if word in tokenizer.special_tokens]
        ids.append(tokenizer.special_tokens[own[0]] if own else tokenizer.vocab_size + number)
    return ids


@dataclass(frozen=True)
class TrainObjective:
    """What training needs of an objective."""

    loss: Loss
    reference: ReferenceModel | None = None  # its weights are an argument of the loss, or the rollout's
    rollout: Rollout | None = None
    is_token_nll: bool = False


def make_train_objective(
    objective: Objective, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, open_model: Callable[[str], Pretrained]
) -> TrainObjective:
    """Loss, reference model and rollout of an objective. Opens no model yet."""
    name = objective.reference_name()
    reference = ReferenceModel(name, lambda: open_model(name), mesh) if name else None
    rollout = objective.rollout(tokenizer, reference, mesh)
    return TrainObjective(objective.loss(reference), reference, rollout, objective.is_token_nll())
