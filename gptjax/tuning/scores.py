"""The metrics of the field by the libraries of the field, each with a bootstrap interval.

A metric turns every example into a few numbers that add up; the metric of any sample is a function of their sums. So a
bootstrap (Efron 1979) resamples sums, and neither compares a text twice nor replaces BLEU of a corpus by a mean over
its sentences. Needs `pip install 'gptjax[tasks]'`; no other file imports these libraries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from seqeval.metrics.sequence_labeling import get_entities

from gptjax.data.tasks import Example
from gptjax.data.tasks.entities import tags_of
from gptjax.tuning.intervals import LEVEL, Score

RESAMPLES = 1000


@dataclass(frozen=True)
class Pieces:
    """What a metric keeps of each example."""

    name: str
    parts: np.ndarray  # float64 [examples, k]
    of_sums: Callable[[np.ndarray], np.ndarray]  # float64 [samples, k] -> [samples]
    signature: str = ""

    @property
    def value(self) -> float:
        """The metric of all examples together."""
        return float(self.of_sums(self.parts.sum(0)[None])[0])

    @property
    def each(self) -> np.ndarray:
        """The metric of every example by itself: float64 [examples]."""
        return self.of_sums(self.parts)

    def grouped(self, groups: Sequence[int]) -> "Pieces":
        """With the rows of one group added up, as they are no independent examples; `groups`: 0 to n - 1, for rows."""
        parts = np.zeros((max(groups) + 1, self.parts.shape[1]))
        np.add.at(parts, np.asarray(groups), self.parts)
        return replace(self, parts=parts)


def score(pieces: Pieces, seed: int = 0) -> Score:
    """The value and its interval, from 1,000 resamples of the examples."""
    return _score(pieces, pieces.value, pieces.of_sums(_resampled_sums(pieces.parts, seed)))


def difference(a: Pieces, b: Pieces, seed: int = 0) -> Score:
    """What `a` has more than `b`, two systems on the same examples, resampled together (Koehn 2004).

    Where the interval does not hold 0, one beats the other by more than chance.
    """
    assert (a.name, a.parts.shape) == (b.name, b.parts.shape), "a difference needs one metric and the same examples"
    resampled = [p.of_sums(_resampled_sums(p.parts, seed)) for p in (a, b)]
    return _score(a, a.value - b.value, resampled[0] - resampled[1])


def _score(pieces: Pieces, value: float, resampled: np.ndarray) -> Score:
    low, high = map(float, np.percentile(resampled, LEVEL))
    return Score(pieces.name, value, low, high, pieces.signature)


def _resampled_sums(parts: np.ndarray, seed: int) -> np.ndarray:
    """The sums over examples drawn with replacement, float64 [resamples, k]: the same draws for every metric."""
    rng, count = np.random.default_rng(seed), len(parts)
    drawn = (np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(RESAMPLES))
    return np.stack([times @ parts for times in drawn])


# Each metric: answers, the references of each (the best one counts), and the examples -> pieces.
Texts = Sequence[str]
References = Sequence[Sequence[str]]
Metric = Callable[[Texts, References, Sequence[Example]], Pieces]


def ratio(name: str, totals: Sequence[float], counts: Sequence[float], signature: str = "") -> Pieces:
    """Sum of totals over sum of counts: with counts of 1 a mean, with tokens as counts a loss."""
    parts = np.stack([totals, counts], 1).astype(np.float64)
    return Pieces(name, parts, lambda sums: sums[:, 0] / sums[:, 1], signature)


def _mean(name: str, values: Sequence[float], signature: str = "") -> Pieces:
    return ratio(name, values, [1.0] * len(values), signature)


def _equal(name: str) -> Metric:
    """The share of answers that are one of their references; space around them does not count."""

    def metric(answers: Texts, references: References, examples: Sequence[Example]) -> Pieces:
        same = [answer.strip() in {r.strip() for r in refs} for answer, refs in zip(answers, references, strict=True)]
        return _mean(name, same)

    return metric


def edit_distance(answers: Texts, references: References, examples: Sequence[Example]) -> Pieces:
    """Mean of the Levenshtein distance over the length of the longer text: 0 for equal ones; lower is better."""
    of = Levenshtein.normalized_distance
    nearest = [min(of(answer, r) for r in refs) for answer, refs in zip(answers, references, strict=True)]
    return _mean("edit_distance", nearest, _version("rapidfuzz"))


def _rouge(name: str) -> Metric:
    """Mean of ROUGE's F-measure against the best reference, 0 to 1 (Lin 2004), with Porter's stemmer.

    Its words are of the letters a to z and digits: for English.
    """
    kind = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}[name]

    def metric(answers: Texts, references: References, examples: Sequence[Example]) -> Pieces:
        scorer = RougeScorer([kind], use_stemmer=True)
        best = [scorer.score_multi(refs, answer)[kind].fmeasure
                for answer, refs in zip(answers, references, strict=True)]  # fmt: skip
        return _mean(name, best, f"{_version('rouge-score')}|stemmer:porter|refs:best")

    return metric


def _sacrebleu(name: str, make: Callable[[], Any]) -> Metric:
    """A corpus metric of sacrebleu (Post 2018), 0 to 100, from what its own significance tests add up."""

    def metric(answers: Texts, references: References, examples: Sequence[Example]) -> Pieces:
        own = make()
        most = max(map(len, references))
        streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
        parts = np.array(own._extract_corpus_statistics(answers, streams), np.float64)

        def of_sums(sums: np.ndarray) -> np.ndarray:
            return np.array([own._compute_score_from_stats(row).score for row in sums.tolist()])

        return Pieces(name, parts, of_sums, signature=str(own.get_signature()))

    return metric


def f1(answers: Texts, references: References, examples: Sequence[Example]) -> Pieces:
    """F1, 0 to 1: of entities where the examples have `tokens`, else of labels."""
    of_entities = all("tokens" in example.values for example in examples)
    return _f1_of_entities(answers, references, examples) if of_entities else _f1_of_labels(answers, references)


def _f1_of_entities(answers: Texts, references: References, examples: Sequence[Example]) -> Pieces:
    """All entities together; right are those with the same words and type (the default mode of seqeval)."""
    rows = []
    for answer, refs, example in zip(answers, references, examples, strict=True):
        tokens = example.values["tokens"].split()
        made, true = (set(get_entities(tags_of(text, tokens))) for text in (answer, refs[0]))
        rows.append([len(made & true), len(made) + len(true)])
    parts = np.array(rows, np.float64)
    # without an entity anywhere it is 0, as in seqeval
    signature = f"{_version('seqeval')}|mode:default|average:micro"
    return Pieces("f1", parts, lambda s: 2 * s[:, 0] / np.maximum(s[:, 1], 1), signature=signature)


def _f1_of_labels(answers: Texts, references: References) -> Pieces:
    """The mean over the labels of the F1 of each, from how often it was right, said and true; as scikit-learn does."""
    said, true = ([text.strip() for text in texts] for texts in (answers, [refs[0] for refs in references]))
    labels = sorted({*said, *true})
    said_is, true_is = (np.array([[text == label for label in labels] for text in texts]) for texts in (said, true))
    parts = np.stack([said_is & true_is, said_is, true_is], 1).astype(np.float64)  # [examples, 3, labels]

    def of_sums(sums: np.ndarray) -> np.ndarray:
        right, said, true = np.moveaxis(sums.reshape(-1, 3, len(labels)), 1, 0)
        there = said + true > 0  # a label that a sample does not hold has no F1
        return (2 * right / np.maximum(said + true, 1)).sum(1) / there.sum(1)

    return Pieces("f1", parts.reshape(len(parts), -1), of_sums, signature="average:macro")


def _version(library: str) -> str:
    return f"{library}:{metadata.version(library)}"


bleu_of_a_text = _sacrebleu("bleu", partial(BLEU, effective_order=True))  # a short text has no n-grams of four

METRICS: dict[str, Metric] = {
    "accuracy": _equal("accuracy"),
    "exact_match": _equal("exact_match"),
    "f1": f1,
    "rouge_1": _rouge("rouge_1"),
    "rouge_2": _rouge("rouge_2"),
    "rouge_l": _rouge("rouge_l"),
    "bleu": _sacrebleu("bleu", BLEU),
    "chrf": _sacrebleu("chrf", CHRF),
    "edit_distance": edit_distance,
}
