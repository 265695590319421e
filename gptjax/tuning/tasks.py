"""Evaluates a model on a task: its answers, their metrics, and the difference to a baseline.

A classifier predicts the labels. A language model answers with the most probable label if the task has labels;
otherwise it generates the answer, greedily or by sampling. If an example has several targets (the turns of a dialogue),
only the last is answered, after the true text of those before it.
"""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.config import DataConfig
from gptjax.data.examples import load_examples, uses_samples
from gptjax.data.tasks import Example, Split, Task, baseline
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import DataError, PromptError
from gptjax.inference import scoring
from gptjax.inference.generator import Generator
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.sampling import SamplingParams
from gptjax.inference.scoring import Scorer, first_token
from gptjax.tuning.classes import ScoredAnswer, check_labels, classify
from gptjax.tuning.scores import METRICS, Score, difference, ratio, score


@dataclass(frozen=True)
class Prediction:
    """One answer of a model."""

    where: str  # file and line that the example is from
    prompt: str
    prediction: str
    references: tuple[str, ...]  # the true answers
    baseline: str  # the answer of the task's baseline, or of the model compared with
    nats: float  # negative log-likelihood of the true answer
    shortened: bool  # the model saw the end of the prompt only


def evaluate_task(
    pretrained: Pretrained,
    task: Task,
    side: Split = "test",
    limit: float | None = None,
    batch_size: int = 8,
    dtype: str | None = None,
    seed: int = 0,
    temperature: float = 0.0,
    against: Pretrained | None = None,
) -> tuple[dict[str, Any], list[Prediction]]:
    """The metrics, and a prediction for each example, in the order of the data.

    Args:
        limit: number of examples (below 1: fraction of them), chosen at random by `seed`. The seed also determines the
            bootstrap and, at a `temperature` above 0, the sampled answers.
        against: a model to compare with, in place of the task's baseline.

    Metrics: for every metric M of the task `M`, its 95% `M_interval`, the baseline's `M_baseline`, the paired
    `M_difference` with `M_difference_interval`, and `M_signature` if M has settings; `loss` (nats/token) and
    `bits_per_byte` of the true answers without the end of text after them (classifier: `loss` only, in nats/label);
    `examples`, `shortened` (prompts that did not fit the context), `seconds`; `sample` (true) if the data was the
    small sample in gptjax. Intervals resample examples, or dialogues if their turns are examples.

    Raises `DataError` for unusable data or other labels, `PromptError` if the context has no room for an answer.
    """
    began = time.perf_counter()
    source = f"task:{task.name}"
    examples = _subset(list(load_examples(source, DataConfig(), side)), limit, seed)
    if not examples:
        raise DataError(f"{source}: its {side} split has no example (limit = {limit})")
    groups = _groups(examples)

    def answers_of(model: Pretrained) -> Iterator[ScoredAnswer]:
        if not model.labels:
            return _language_model_answers(model, task, examples, batch_size, dtype, temperature, seed)
        check_labels(model, task)
        labelled = _subset(list(load_examples(source, DataConfig(answers="classes"), side)), limit, seed)
        return classify(model, task, labelled, batch_size, dtype)

    predictions, nlls, counts, shortened = zip(*answers_of(pretrained), strict=True)
    references = [tuple(r.strip() for r in x.references or (x.answer,)) for x in examples]
    if against is None:
        other = list(map(baseline(task, load_examples(source, DataConfig(), "train")), examples))
    else:
        other = [answer.text for answer in answers_of(against)]

    metrics: dict[str, Any] = {"task": task.name, "side": side}
    if task.source and uses_samples():
        metrics["sample"] = True
    for name in task.metrics:
        model, reference = (METRICS[name](x, references, examples).grouped(groups) for x in (predictions, other))
        metrics |= _with_interval(name, score(model, seed)) | {f"{name}_baseline": reference.value}
        metrics |= _with_interval(f"{name}_difference", difference(model, reference, seed))
        if model.signature:
            metrics[f"{name}_signature"] = model.signature
    losses = [ratio("loss", nlls, counts)]
    if not pretrained.labels:
        num_bytes = [len(x.answer.encode()) for x in examples]
        losses.append(ratio("bits_per_byte", [nll / math.log(2) for nll in nlls], num_bytes))
    for statistics in losses:
        metrics |= _with_interval(statistics.name, score(statistics.grouped(groups), seed))
    metrics |= {"examples": len(examples), "shortened": sum(shortened), "seconds": time.perf_counter() - began}
    rows = zip(examples, predictions, references, other, nlls, shortened, strict=True)
    return metrics, [Prediction(x.where, x.prompt, *rest) for x, *rest in rows]


def _language_model_answers(
    pretrained: Pretrained,
    task: Task,
    examples: Sequence[Example],
    batch_size: int,
    dtype: str | None,
    temperature: float,
    seed: int,
) -> Iterator[ScoredAnswer]:
    """The answers of a language model: the most probable labels, or generated texts."""
    room = _prompt_room(pretrained, task, examples[0])
    full_prompts = [_ids(pretrained.tokenizer, x, x.answer)[0] for x in examples]
    prompts = [ids[-room:] for ids in full_prompts]
    scorer = Scorer(pretrained, batch_size, dtype)
    nlls, counts, answers = zip(*_likelihoods(scorer, task, examples, prompts), strict=True)
    if not task.labels:
        sampling = SamplingParams(temperature=temperature)
        generator = Generator(pretrained, dtype)
        answers = tuple(_generated(generator, task, examples, prompts, batch_size, sampling, seed))
    for answer, nll, count, ids in zip(answers, nlls, counts, full_prompts, strict=True):
        yield ScoredAnswer(answer, nll, count, len(ids) > room)


def _subset(examples: list[Example], limit: float | None, seed: int) -> list[Example]:
    """A random subset in the order of the data, since the first examples may all be of one kind."""
    if limit is None or limit >= len(examples):
        return examples
    count = int(limit) if limit >= 1 else math.ceil(limit * len(examples))
    chosen = np.random.default_rng(seed).choice(len(examples), max(count, 0), replace=False)
    return [examples[i] for i in sorted(chosen)]


def _groups(examples: Sequence[Example]) -> list[int]:
    """A number for each example, the same for the turns of a dialogue, which are not independent."""
    continues = [b.prompt.startswith(a.prompt + a.answer) for a, b in itertools.pairwise(examples)]
    return np.cumsum([0, *np.logical_not(continues)]).tolist()


def _ids(tokenizer: Tokenizer, example: Example, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the prompt, at least one, and of an answer, tokenized as in training."""
    last = max(i for i, part in enumerate(example.parts) if part.is_target)
    *before, own = tokenizer.encode_parts([*([part.text for part in example.parts[:last]] or [""]), answer])
    prompt = np.concatenate(before).astype(np.int32)
    if len(prompt):
        return prompt, own
    first = first_token(tokenizer)
    if first is None:
        raise PromptError(f"{example.where}: the prompt is empty, and the tokenizer has no token that begins a text")
    return np.array([first], np.int32), own


def _around(answer: str, label: str) -> str:
    """A label with the whitespace that the template has around the answer."""
    return answer.replace(answer.strip(), label, 1)


def _prompt_room(pretrained: Pretrained, task: Task, example: Example) -> int:
    """The most tokens that a prompt may have."""
    context, needed = pretrained.model.context_length, task.max_new_tokens
    if task.labels:
        labels = (_around(example.answer, label) for label in task.labels)
        needed = max(len(_ids(pretrained.tokenizer, example, label)[1]) for label in labels)
    if needed >= context:
        raise PromptError(
            f"task:{task.name}: the context of {pretrained.name} is {context}, and {needed} tokens are reserved for an "
            "answer, so there is no room for a prompt; use a model with a longer context"
        )
    return context - needed


def _likelihoods(
    scorer: Scorer, task: Task, examples: Sequence[Example], prompts: Sequence[np.ndarray]
) -> Iterator[tuple[float, int, str]]:
    """For each example the NLL of the true answer, its number of tokens, and the most probable label ("" if none)."""
    context = scorer.config.context_length
    lengths: list[int] = []

    def requests() -> Iterator[scoring.ScoreRequest]:
        for example, prompt in zip(examples, prompts, strict=True):
            for text in (example.answer, *(_around(example.answer, label) for label in task.labels)):
                ids = _ids(scorer.tokenizer, example, text)[1]
                if not 1 <= len(ids) <= context:
                    raise DataError(
                        f"{example.where}: the answer has {len(ids)} tokens; it must have 1 to {context}, the "
                        f"context of {scorer.pretrained.name}"
                    )
                lengths.append(len(ids))
                yield scoring.ScoreRequest(np.concatenate([prompt, ids])[-(context + 1) :], len(ids))

    nlls = [float(a.nll.sum(dtype=np.float64)) for a in scorer.score_batch(requests())]
    stride = 1 + len(task.labels)  # the true answer, then every label
    for first in range(0, len(nlls), stride):
        label = ""
        if task.labels:
            label = task.labels[int(np.argmin(nlls[first + 1 : first + stride]))]
        yield nlls[first], lengths[first], label


def _generated(
    generator: Generator,
    task: Task,
    examples: Sequence[Example],
    prompts: Sequence[np.ndarray],
    batch_size: int,
    sampling: SamplingParams,
    seed: int,
) -> list[str]:
    """A continuation of each prompt, up to the end of the line if no true answer has several lines."""
    seeds = np.random.default_rng(seed).integers(1 << 62, size=len(prompts)).tolist()
    stop = () if any("\n" in x.answer.rstrip() for x in examples) else ("\n",)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        own = [seeds[i] for i in chosen]
        completions = generator.generate([prompts[i] for i in chosen], task.max_new_tokens, sampling, stop, own)
        for i, completion in zip(chosen, completions, strict=True):
            texts[i] = completion.text.strip()
    return texts


def _with_interval(name: str, score: Score) -> dict[str, Any]:
    return {name: score.value, f"{name}_interval": [score.low, score.high]}
