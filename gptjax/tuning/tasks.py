"""A model on a task: what it answers, how that scores, and how far it is above a trivial answer.

A head for classes tells its labels. Of a model that tells tokens, the likeliest label after the prompt is the answer
where a task has labels; anywhere else it is written, greedily or drawn. Of several parts that are asked for, the turns
of a dialogue, the last is answered, given what was truly said before it.
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
from gptjax.tuning.classes import Told, check_labels, tell
from gptjax.tuning.scores import METRICS, Score, difference, ratio, score


@dataclass(frozen=True)
class Prediction:
    """One answer of a model."""

    where: str  # file and line that the example is from
    prompt: str
    prediction: str
    references: tuple[str, ...]  # the right answers
    baseline: str  # the trivial answer, or that of the model compared with
    nats: float  # -ln of the probability of the true answer
    shortened: bool  # whether the model was shown the end of the prompt only


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
    """The figures, and a prediction for each example, in the order of the data.

    `limit`: as many examples (below 1: this share of them), drawn by `seed`, which also draws the resamples, and the
    answers where there is a `temperature`. `against`: a model whose answers, made alike, stand for the trivial ones.
    Figures: for every metric M of the task `M`, its 95% `M_interval`, the trivial answer's `M_baseline`, the paired
    `M_difference` to it and `M_difference_interval`, and where M has settings `M_signature`; `loss` (nats a token) and
    `bits_per_byte` of the true answers, without the end_of_text after them (of classes: `loss` alone, nats a label);
    `examples`, `shortened` (how many prompts had no room, so that their end alone was shown), `seconds`; `sample`
    (true) where only gptjax's own sample was read. Intervals resample examples; whole dialogues, where the turns of one
    are examples of their own.
    Raises `DataError` for data that cannot be used or another task's labels, `PromptError` where the context has no
    room for an answer.
    """
    began = time.perf_counter()
    source = f"task:{task.name}"
    questions = _drawn(list(load_examples(source, DataConfig(), side)), limit, seed)
    if not questions:
        raise DataError(f"{source}: its {side} side has no example (limit = {limit})")
    groups = _groups(questions)

    def told_by(model: Pretrained) -> Iterator[Told]:
        if not model.labels:
            return _in_text(model, task, questions, batch_size, dtype, temperature, seed)
        check_labels(model, task)
        labelled = _drawn(list(load_examples(source, DataConfig(answers="classes"), side)), limit, seed)
        return tell(model, task, labelled, batch_size, dtype)

    predictions, nats, counts, shortened = zip(*told_by(pretrained), strict=True)
    references = [tuple(r.strip() for r in q.references or (q.answer,)) for q in questions]
    if against is None:
        trivial = list(map(baseline(task, load_examples(source, DataConfig(), "train")), questions))
    else:
        trivial = [answer for answer, *_ in told_by(against)]

    of_sample = {"sample": True} if task.source and uses_samples() else {}
    figures: dict[str, Any] = {"task": task.name, "side": side} | of_sample
    for metric in task.metrics:
        of = METRICS[metric]
        model, reference = (of(texts, references, questions).grouped(groups) for texts in (predictions, trivial))
        figures |= _figures(metric, score(model, seed)) | {f"{metric}_baseline": reference.value}
        figures |= _figures(f"{metric}_difference", difference(model, reference, seed))
        figures |= {f"{metric}_signature": model.signature} if model.signature else {}
    bits, num_bytes = [x / math.log(2) for x in nats], [len(q.answer.encode()) for q in questions]
    losses = [ratio("loss", nats, counts), ratio("bits_per_byte", bits, num_bytes)]
    for pieces in losses[:1] if pretrained.labels else losses:
        figures |= _figures(pieces.name, score(pieces.grouped(groups), seed))
    rows = zip(questions, predictions, references, trivial, nats, shortened, strict=True)
    return figures | {
        "examples": len(questions),
        "shortened": sum(shortened),
        "seconds": time.perf_counter() - began,
    }, [Prediction(q.where, q.prompt, *rest) for q, *rest in rows]


def _in_text(
    pretrained: Pretrained,
    task: Task,
    questions: Sequence[Example],
    batch_size: int,
    dtype: str | None,
    temperature: float,
    seed: int,
) -> Iterator[Told]:
    """What a model of tokens answers, the nats of the true answer, its tokens, and whether the prompt was shortened."""
    room = _room(pretrained, task, questions[0])
    whole = [_ids(pretrained.tokenizer, q, q.answer)[0] for q in questions]
    prompts = [ids[-room:] for ids in whole]
    scorer = Scorer(pretrained, batch_size, dtype)
    nats, tokens, likeliest = zip(*_likelihoods(scorer, task, questions, prompts), strict=True)
    if not task.labels:
        rule, writer = SamplingParams(temperature=temperature), Generator(pretrained, dtype)
        likeliest = tuple(_written(writer, task, questions, prompts, batch_size, rule, seed))
    yield from zip(likeliest, nats, tokens, (len(ids) > room for ids in whole), strict=True)


def _drawn(all_of_them: list[Example], limit: float | None, seed: int) -> list[Example]:
    """So many of the examples, in their order: those at the beginning may be all of one kind."""
    if limit is None or limit >= len(all_of_them):
        return all_of_them
    count = int(limit) if limit >= 1 else math.ceil(limit * len(all_of_them))
    chosen = np.random.default_rng(seed).choice(len(all_of_them), max(count, 0), replace=False)
    return [all_of_them[i] for i in sorted(chosen)]


def _groups(questions: Sequence[Example]) -> list[int]:
    """A number for each, the same for those that follow one another in one dialogue: they are not independent."""
    goes_on = [b.prompt.startswith(a.prompt + a.answer) for a, b in itertools.pairwise(questions)]
    return np.cumsum([0, *np.logical_not(goes_on)]).tolist()


def _ids(tokenizer: Tokenizer, question: Example, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """The prompt, at least one token, and an answer to it, cut into tokens as in training."""
    last = max(i for i, part in enumerate(question.parts) if part.is_target)
    *before, own = tokenizer.encode_parts([*([part.text for part in question.parts[:last]] or [""]), answer])
    prompt = np.concatenate(before).astype(np.int32)
    if len(prompt):
        return prompt, own
    first = first_token(tokenizer)
    if first is None:
        raise PromptError(f"{question.where}: the prompt is empty, and the tokenizer has nothing to begin a text with")
    return np.array([first], np.int32), own


def _around(answer: str, label: str) -> str:
    """A label with the space that the template puts around an answer."""
    return answer.replace(answer.strip(), label, 1)


def _room(pretrained: Pretrained, task: Task, question: Example) -> int:
    """How many tokens of a prompt leave room for an answer."""
    context, needed = pretrained.model.context_length, task.max_new_tokens
    if task.labels:
        labels = (_around(question.answer, label) for label in task.labels)
        needed = max(len(_ids(pretrained.tokenizer, question, label)[1]) for label in labels)
    if needed >= context:
        raise PromptError(
            f"task:{task.name}: {needed} tokens are kept for an answer, and the context of {pretrained.name} has "
            f"{context}: nothing of a prompt would be seen; take a model with a longer context"
        )
    return context - needed


def _likelihoods(
    scorer: Scorer, task: Task, questions: Sequence[Example], prompts: Sequence[np.ndarray]
) -> Iterator[tuple[float, int, str]]:
    """Of each question the nats of the true answer, its tokens, and the likeliest label ("" where there are none)."""
    context, lengths = scorer.config.context_length, []

    def parts() -> Iterator[scoring.ScoreRequest]:
        for question, prompt in zip(questions, prompts, strict=True):
            for text in (question.answer, *(_around(question.answer, label) for label in task.labels)):
                ids = _ids(scorer.tokenizer, question, text)[1]
                if not 1 <= len(ids) <= context:
                    raise DataError(
                        f"{question.where}: the answer has {len(ids)} tokens; 1 to {context}, the context of "
                        f"{scorer.pretrained.name}, can be scored"
                    )
                lengths.append(len(ids))
                yield scoring.ScoreRequest(np.concatenate([prompt, ids])[-(context + 1) :], len(ids))

    nats = [float(a.nll.sum(dtype=np.float64)) for a in scorer.score_batch(parts())]
    every = 1 + len(task.labels)
    for first in range(0, len(nats), every):
        of_labels = nats[first + 1 : first + every]
        likeliest = task.labels[int(np.argmin(of_labels))] if of_labels else ""
        yield nats[first], lengths[first], likeliest


def _written(
    writer: Generator,
    task: Task,
    questions: Sequence[Example],
    prompts: Sequence[np.ndarray],
    batch_size: int,
    rule: SamplingParams,
    seed: int,
) -> list[str]:
    """A continuation of each prompt; to the end of a line where no true answer is longer."""
    seeds = np.random.default_rng(seed).integers(1 << 62, size=len(prompts)).tolist()
    stop = () if any("\n" in q.answer.rstrip() for q in questions) else ("\n",)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        own = [seeds[i] for i in chosen]
        made = writer.generate([prompts[i] for i in chosen], task.max_new_tokens, rule, stop, own)
        for i, completion in zip(chosen, made, strict=True):
            texts[i] = completion.text.strip()
    return texts


def _figures(name: str, score: Score) -> dict[str, Any]:
    return {name: score.value, f"{name}_interval": [score.low, score.high]}
