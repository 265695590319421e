"""Learning from answers that the model writes itself, by how they score: the expected risk of whole sequences.

risk: policy gradient with the mean of the other answers to the prompt as baseline (Williams 1992; Kool et al. 2019),
which is an unbiased gradient of E[score] - beta KL(model || reference); minimum-risk training of Shen et al. 2016 has
the same aim. grpo: the score against mean and deviation of its group, and the penalty a token (Shao et al. 2024; one
update an answer, so that nothing is clipped).
Answers are drawn at temperature 1, by seeds that follow from the experiment's seed and the step.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from gptjax import random_streams, sharding
from gptjax.config import Experiment
from gptjax.data.objectives import Batch
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import ConfigError, GptjaxError
from gptjax.inference.generator import Completion, Generator
from gptjax.inference.pretrained import Pretrained
from gptjax.model.gpt import GPT
from gptjax.model.weights import merge_lora
from gptjax.training.step import token_nll
from gptjax.tuning.reference import ReferenceModel

Scorer = Callable[[Sequence[str], Sequence[str], Sequence[str]], np.ndarray]  # prompts, texts, answers -> [n]


class Question(NamedTuple):
    """What a row asks: the last answer of its example, and what stands before it."""

    prompt: np.ndarray  # int32 ids
    answer: str  # the true one


class Rollout:
    """Makes the batch of a step of what the model writes to the prompts of its rows."""

    def __init__(
        self, experiment: Experiment, tokenizer: Tokenizer, reference: ReferenceModel | None, mesh: jax.sharding.Mesh
    ):
        self.experiment, self.tokenizer, self.reference, self.mesh = experiment, tokenizer, reference, mesh
        self.score = make_scorer(experiment.objective.reward)
        self.nats = jax.jit(
            lambda params, batch, model: token_nll(params, batch, GPT(model), {})[0], static_argnames="model"
        )

    def __call__(self, params: Any, batch: Batch, step: int) -> tuple[Batch, dict[str, float]]:
        """The [microbatches, rows, length] batch of the update from `step` to step + 1, on the devices, and figures.

        Figures: score, kl (nats a text that the model has moved away from the reference), answer_tokens.
        """
        o, shape = self.experiment.objective, batch.tokens.shape
        rows: Batch = jax.tree.map(lambda x: np.asarray(x).reshape(-1, shape[-1]), jax.device_get(batch))
        questions = self.questions(rows)
        made = self.write(params, questions, (self.experiment.seed, random_streams.ON_POLICY_TRAIN, step))
        scores = self.scores(questions, made)
        written = as_batch([q.prompt for q in questions], [c.ids for c in made], shape[-1])
        moved = self._moved(params, written, shape)
        advantages = (group_advantages if o.name == "grpo" else leave_one_out_advantages)(
            scores.reshape(-1, o.num_generations), moved, np.asarray(written.loss_weights), o.beta
        )
        whole = jax.tree.map(lambda x: x.reshape(shape), written._replace(advantages=advantages))
        figures = {
            "score": scores.mean(),
            "kl": moved.sum() / len(moved),
            "answer_tokens": written.loss_weights.sum() / len(moved),
        }
        return sharding.shard_from_host(whole, ("microbatch", "batch", "length"), self.mesh), {
            name: float(x) for name, x in figures.items()
        }

    def questions(self, rows: Batch) -> list[Question]:
        """What the [rows, length] of a `supervised` batch ask; rows that ask nothing, the padding, are left out."""
        end, room = self.tokenizer.eos_id, rows.tokens.shape[1] - self.experiment.objective.max_new_tokens
        found = []
        for tokens, targets, weights in zip(rows.tokens, rows.targets, rows.loss_weights, strict=True):
            asked = np.flatnonzero(weights)
            if len(asked) == 0:
                continue
            first = asked[np.flatnonzero(np.diff(asked, prepend=-2) > 1)[-1]]  # of the last of several
            ids = [int(i) for i in targets[first : asked[-1] + 1] if i != end]
            prompt = np.asarray(tokens[: first + 1], np.int32)
            found.append(Question(prompt[-room:], self.tokenizer.decode(ids).strip()))
        return found

    def write(self, params: Any, questions: Sequence[Question], key: tuple[int, ...]) -> list[Completion]:
        """An answer to each question, drawn at temperature 1."""
        mesh = self.mesh
        if mesh.shape[sharding.CORES] > 1:  # each would write all of it
            params, mesh = sharding.on_one_device(params), sharding.one_device()
        stops = self.reference.pretrained.stop_tokens if self.reference else ()
        seeds = np.random.default_rng(key).integers(1 << 62, size=len(questions)).tolist()
        with jax.set_mesh(mesh):
            model, whole = merge_lora(self.experiment.model, params)
            writer = Generator(Pretrained(self.experiment.name, model, whole, self.tokenizer, stop_tokens=stops))
            return writer.complete([q.prompt for q in questions], self.experiment.objective.max_new_tokens, seeds=seeds)

    def scores(self, questions: Sequence[Question], made: Sequence[Completion]) -> np.ndarray:
        """The score of each answer: float64, higher is better."""
        prompts, answers = [self.tokenizer.decode(q.prompt) for q in questions], [q.answer for q in questions]
        return self.score(prompts, [c.text.strip() for c in made], answers)

    def _moved(self, params: Any, rows: Batch, shape: tuple[int, ...]) -> np.ndarray:
        """ln of each written token's probability under the model less that under the reference: [rows, length]."""
        if self.reference is None:
            return np.zeros(rows.tokens.shape)
        theirs = (self.reference.params, self.reference.pretrained.model)
        moved = []
        for first in range(0, len(rows.tokens), shape[1]):
            part = jax.tree.map(lambda x, first=first: x[first : first + shape[1]], rows)
            placed = sharding.shard_from_host(part, ("batch", "length"), self.mesh)
            of_reference, of_model = (self.nats(p, placed, m) for p, m in (theirs, (params, self.experiment.model)))
            moved.append(np.asarray(of_reference, np.float64) - np.asarray(of_model, np.float64))
        return np.concatenate(moved) * rows.loss_weights


def as_batch(prompts: Sequence[np.ndarray], made: Sequence[np.ndarray], length: int) -> Batch:
    """Prompts and what was written after them as a batch that asks for the latter: [texts, length]."""
    tokens, targets = np.zeros((2, len(prompts), length), np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for row, (prompt, ids) in enumerate(zip(prompts, made, strict=True)):
        text = np.concatenate([prompt, ids])
        tokens[row, : len(text) - 1], targets[row, : len(text) - 1] = text[:-1], text[1:]
        weights[row, len(prompt) - 1 : len(text) - 1] = 1
    return Batch(tokens, targets, weights)


def leave_one_out_advantages(scores: np.ndarray, moved: np.ndarray, weights: np.ndarray, beta: float) -> np.ndarray:
    """Score less beta times the log-ratio to the reference, less the mean of that over the other answers.

    scores [prompts, samples], moved (log-ratios) and weights [texts, length] -> float32 [texts, length], one a text.
    """
    rewards = scores - beta * moved.sum(-1).reshape(scores.shape)
    others = (rewards.sum(1, keepdims=True) - rewards) / (rewards.shape[1] - 1)
    return (weights * (rewards - others).reshape(-1, 1)).astype(np.float32)


def group_advantages(scores: np.ndarray, moved: np.ndarray, weights: np.ndarray, beta: float) -> np.ndarray:
    """(score - mean) / deviation of the group, and a pull to the reference at every token; each over the text's length.

    The pull is the gradient of the estimate r - ln r - 1 of KL(model || reference), r = reference / model at the token.
    """
    deviation = scores.std(1, ddof=1, keepdims=True)
    relative = ((scores - scores.mean(1, keepdims=True)) / (deviation + 1e-4)).reshape(-1, 1)
    lengths = np.maximum(weights.sum(-1, keepdims=True), 1)
    return (weights * (relative - beta * (1 - np.exp(-moved))) / lengths).astype(np.float32)


def make_scorer(name: str) -> Scorer:
    """A metric of `tuning.scores` of each answer by itself, its sign such that higher is better; or `module:function`.

    The function is given (prompt, what was written, the true answer) and returns a number. Raises `ConfigError` for a
    name that is neither.
    """
    if ":" in name:
        return partial(_by_function, _find(name))
    try:
        from gptjax.tuning.intervals import LOWER_IS_BETTER
        from gptjax.tuning.scores import METRICS, bleu_of_a_text
    except ModuleNotFoundError as e:
        raise GptjaxError(
            f"objective.reward = {name!r}: needs a library that is not installed ({e}); pip install 'gptjax[tasks]'"
        ) from None
    known = sorted(METRICS.keys() - {"f1"})  # which is of many answers together
    if name not in known:
        raise ConfigError([f"objective.reward = {name!r}: must be one of {', '.join(known)}, or module:function"])
    metric, sign = METRICS[name], -1.0 if name in LOWER_IS_BETTER else 1.0
    if name == "bleu":
        metric = bleu_of_a_text

    def score(prompts: Sequence[str], texts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        return sign * metric(texts, [(answer,) for answer in answers], ()).each

    return score


def _by_function(
    function: Callable[[str, str, str], float], prompts: Sequence[str], texts: Sequence[str], answers: Sequence[str]
) -> np.ndarray:
    scores = [function(*row) for row in zip(prompts, texts, answers, strict=True)]
    for score, text in zip(scores, texts, strict=True):
        if not isinstance(score, int | float | np.number) or not np.isfinite(score):
            raise GptjaxError(f"objective.reward: gave {score!r} for the answer {text!r}; a finite number is needed")
    return np.array(scores, np.float64)


def _find(name: str) -> Callable[[str, str, str], float]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as e:  # of the user's own module
        problem = f"objective.reward = {name!r}: cannot be imported ({type(e).__name__}: {e})"
        raise ConfigError([f"{problem}; name a function as module:function"]) from None
    if not callable(found):
        raise ConfigError([f"objective.reward = {name!r}: is no function of (prompt, text, answer), but {found!r}"])
    return found
