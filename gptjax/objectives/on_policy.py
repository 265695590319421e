"""What RLOO and GRPO share: training on answers that the model samples, weighted by their rewards.

Answers are sampled at temperature 1 with seeds that follow from the experiment's seed and the step.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax import random_streams, sharding
from gptjax.config import Experiment
from gptjax.data.batches import Batch, MakeBatch
from gptjax.data.tokenizer import Tokenizer
from gptjax.inference.generator import Completion, Generator
from gptjax.inference.pretrained import Pretrained
from gptjax.model.gpt import GPT
from gptjax.model.weights import merge_lora
from gptjax.objectives.base import Group, Objective, reference_problems
from gptjax.objectives.losses import Loss, num_rows, token_loss, token_nll
from gptjax.objectives.reference import ReferenceModel
from gptjax.objectives.rewards import make_reward
from gptjax.objectives.sft import answer_batch

# rewards [prompts, samples], log-ratios and loss weights [answers, length], beta -> advantages [answers, length]
Advantages = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]


class OnPolicy(Objective):
    """Subclasses define `advantages`."""

    fields = ("reference", "beta", "reward", "num_generations", "max_new_tokens", "z_loss")
    needs_answers = True
    advantages: Advantages

    def group(self) -> Group:
        return Group(rows=self.config.num_generations, examples=1)

    def batch_maker(self, tokenizer: Tokenizer) -> MakeBatch:
        return answer_batch

    def reference_name(self) -> str | None:
        if self.config.beta == 0:
            return None
        return self.config.reference or self.experiment.init

    def loss(self, reference: ReferenceModel | None) -> Loss:
        return token_loss(self.config.z_loss, num_rows)

    def is_token_nll(self) -> bool:
        return False

    def rollout(self, tokenizer: Tokenizer, reference: ReferenceModel | None, mesh: jax.sharding.Mesh) -> "Rollout":
        return Rollout(self.experiment, tokenizer, reference, mesh, type(self).advantages)

    def problems(self) -> Iterator[str]:
        o, m, t = self.config, self.experiment.model, self.experiment.train
        if o.beta > 0:
            yield from reference_problems(self.experiment)
        elif o.reference is not None:
            yield (
                f"objective.reference = {o.reference!r}: has no effect with objective.beta = 0; leave it out, or set "
                "beta"
            )
        if m.dropout != 0:
            yield (
                f"model.dropout = {m.dropout}: with objective.name = {o.name!r} the trained model would differ from "
                "the one that sampled the answers; set 0"
            )
        if o.num_generations < 2:
            yield (
                f"objective.num_generations = {o.num_generations}: an answer is compared with others to the same "
                "prompt; choose 2 or more"
            )
        if t.batch_size % o.num_generations:
            yield (
                f"train.batch_size = {t.batch_size}: objective.name = {o.name!r} reads {o.num_generations} rows "
                "together (objective.num_generations); choose a multiple"
            )
        if self.experiment.knows_shape and o.max_new_tokens >= m.context_length:
            yield (
                f"objective.max_new_tokens = {o.max_new_tokens}: leaves no room for the prompt in model.context_length "
                f"= {m.context_length}; choose fewer"
            )


class RolloutPrompt(NamedTuple):
    """The prompt of a row: everything before the last answer of its example."""

    prompt: np.ndarray  # int32 ids
    answer: str  # the true one


class Rollout:
    """Replaces a batch of examples by answers that the model samples for their prompts."""

    def __init__(
        self,
        experiment: Experiment,
        tokenizer: Tokenizer,
        reference: ReferenceModel | None,
        mesh: jax.sharding.Mesh,
        advantages: Advantages,
    ):
        self.experiment, self.tokenizer, self.reference, self.mesh = experiment, tokenizer, reference, mesh
        self.advantages = advantages
        self.reward = make_reward(experiment.objective.reward)
        self._nll = jax.jit(
            lambda params, batch, config: token_nll(params, batch, GPT(config), {})[0], static_argnames="config"
        )

    def __call__(self, params: Any, batch: Batch, step: int) -> tuple[Batch, dict[str, float]]:
        """The [microbatches, rows, length] batch of the update from `step` to step + 1, on the devices, and metrics.

        Metrics: score (the mean reward), kl (from the reference model, nats/answer), answer_tokens.
        """
        o, shape = self.experiment.objective, batch.tokens.shape
        rows: Batch = jax.tree.map(lambda x: np.asarray(x).reshape(-1, shape[-1]), jax.device_get(batch))
        prompts = self.prompts(rows)
        samples = self.sample(params, prompts, (self.experiment.seed, random_streams.ON_POLICY_TRAIN, step))
        rewards = self.rewards(prompts, samples)
        sampled = sampled_batch([p.prompt for p in prompts], [s.ids for s in samples], shape[-1])
        log_ratios = self._log_ratios(params, sampled, shape)
        weights = np.asarray(sampled.loss_weights)
        advantages = self.advantages(rewards.reshape(-1, o.num_generations), log_ratios, weights, o.beta)
        metrics = {
            "score": float(rewards.mean()),
            "kl": float(log_ratios.sum() / len(log_ratios)),
            "answer_tokens": float(weights.sum() / len(log_ratios)),
        }
        sampled = jax.tree.map(lambda x: x.reshape(shape), sampled._replace(advantages=advantages))
        return sharding.shard_from_host(sampled, ("microbatch", "batch", "length"), self.mesh), metrics

    def prompts(self, rows: Batch) -> list[RolloutPrompt]:
        """The prompts of a [rows, length] `answer_batch`; rows without targets (padding) are left out."""
        room = rows.tokens.shape[1] - self.experiment.objective.max_new_tokens
        found = []
        for tokens, targets, weights in zip(rows.tokens, rows.targets, rows.loss_weights, strict=True):
            positions = np.flatnonzero(weights)
            if len(positions) == 0:
                continue
            begins = np.flatnonzero(np.diff(positions, prepend=-2) > 1)
            first = positions[begins[-1]]  # of the last answer
            ids = [int(i) for i in targets[first : positions[-1] + 1] if i != self.tokenizer.eos_id]
            prompt = np.asarray(tokens[: first + 1], np.int32)
            found.append(RolloutPrompt(prompt[-room:], self.tokenizer.decode(ids).strip()))
        return found

    def sample(self, params: Any, prompts: Sequence[RolloutPrompt], key: tuple[int, ...]) -> list[Completion]:
        """An answer to each prompt, sampled at temperature 1."""
        mesh = self.mesh
        if mesh.shape[sharding.CORES] > 1:  # each core would generate all answers
            params, mesh = sharding.on_one_device(params), sharding.one_device()
        stops = self.reference.pretrained.stop_tokens if self.reference else ()
        seeds = np.random.default_rng(key).integers(1 << 62, size=len(prompts)).tolist()
        with jax.set_mesh(mesh):
            config, merged = merge_lora(self.experiment.model, params)
            model = Pretrained(self.experiment.name, config, merged, self.tokenizer, stop_tokens=stops)
            max_new_tokens = self.experiment.objective.max_new_tokens
            return Generator(model).generate([p.prompt for p in prompts], max_new_tokens, seeds=seeds)

    def rewards(self, prompts: Sequence[RolloutPrompt], samples: Sequence[Completion]) -> np.ndarray:
        """The reward of each answer: float64 [answers]."""
        texts = [self.tokenizer.decode(p.prompt) for p in prompts]
        return self.reward(texts, [s.text.strip() for s in samples], [p.answer for p in prompts])

    def _log_ratios(self, params: Any, rows: Batch, shape: tuple[int, ...]) -> np.ndarray:
        """ln of each sampled token's probability under the model minus that under the reference: [rows, length]."""
        if self.reference is None:
            return np.zeros(rows.tokens.shape)
        log_ratios = []
        for first in range(0, len(rows.tokens), shape[1]):
            part = jax.tree.map(lambda x, first=first: x[first : first + shape[1]], rows)
            part = sharding.shard_from_host(part, ("batch", "length"), self.mesh)
            of_reference = self._nll(self.reference.params, part, self.reference.pretrained.model)
            of_model = self._nll(params, part, self.experiment.model)
            log_ratios.append(np.asarray(of_reference, np.float64) - np.asarray(of_model, np.float64))
        return np.concatenate(log_ratios) * rows.loss_weights


def sampled_batch(prompts: Sequence[np.ndarray], samples: Sequence[np.ndarray], length: int) -> Batch:
    """Prompts and sampled answers as a batch whose targets are the answers: [answers, length]."""
    tokens, targets = np.zeros((2, len(prompts), length), np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for row, (prompt, ids) in enumerate(zip(prompts, samples, strict=True)):
        text = np.concatenate([prompt, ids])
        tokens[row, : len(text) - 1] = text[:-1]
        targets[row, : len(text) - 1] = text[1:]
        weights[row, len(prompt) - 1 : len(text) - 1] = 1
    return Batch(tokens, targets, weights)
