"""Standard metrics from standard libraries, each with a bootstrap interval.

A metric computes a few additive statistics of every example; its value on a sample is a function of their sums. So the
bootstrap (Efron 1979) resamples statistics: no text is compared twice, and BLEU stays a corpus metric, not a mean over
sentences. Needs `pip install 'gptjax[tasks]'`; no other file imports these libraries.
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
class Statistics:
    """The additive statistics of each example, from which a metric is computed."""

    name: str
    parts: np.ndarray  # float64 [examples, k]
    of_sums: Callable[[np.ndarray], np.ndarray]  # float64 [samples, k] -> [samples]
    signature: str = ""

    @property
    def value(self) -> float:
        """The metric of all examples."""
        return float(self.of_sums(self.parts.sum(0)[None])[0])

    @property
    def each(self) -> np.ndarray:
        """The metric of every example by itself: float64 [examples]."""
        return self.of_sums(self.parts)

    def grouped(self, groups: Sequence[int]) -> "Statistics":
        """The sums over groups of dependent examples; `groups` numbers the group of each example, from 0."""
        parts = np.zeros((max(groups) + 1, self.parts.shape[1]))
        np.add.at(parts, np.asarray(groups), self.parts)
        return replace(self, parts=parts)


def score(statistics: Statistics, seed: int = 0) -> Score:
    """The value and its interval, from 1,000 resamples of the examples."""
    return _score(statistics, statistics.value, statistics.of_sums(_resampled_sums(statistics.parts, seed)))


def difference(a: Statistics, b: Statistics, seed: int = 0) -> Score:
    """The difference a - b of two systems on the same examples, by the paired bootstrap (Koehn 2004).

    It is significant if the interval does not contain 0.
    """
    assert (a.name, a.parts.shape) == (b.name, b.parts.shape), "a difference needs one metric and the same examples"
    resampled = [p.of_sums(_resampled_sums(p.parts, seed)) for p in (a, b)]
    return _score(a, a.value - b.value, resampled[0] - resampled[1])


def _score(statistics: Statistics, value: float, resampled: np.ndarray) -> Score:
    low, high = map(float, np.percentile(resampled, LEVEL))
    return Score(statistics.name, value, low, high, statistics.signature)


def _resampled_sums(parts: np.ndarray, seed: int) -> np.ndarray:
    """Sums over examples resampled with replacement, float64 [resamples, k]; the same resamples for every metric."""
    rng, count = np.random.default_rng(seed), len(parts)
    drawn = (np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(RESAMPLES))
    return np.stack([times @ parts for times in drawn])


# Each metric: answers, the references of each (the best one counts), and the examples -> statistics.
Texts = Sequence[str]
References = Sequence[Sequence[str]]
Metric = Callable[[Texts, References, Sequence[Example]], Statistics]


def ratio(name: str, totals: Sequence[float], counts: Sequence[float], signature: str = "") -> Statistics:
    """Sum of totals / sum of counts: a mean if the counts are 1, a loss per token if they are tokens."""
    parts = np.stack([totals, counts], 1).astype(np.float64)
    return Statistics(name, parts, lambda sums: sums[:, 0] / sums[:, 1], signature)


def _mean(name: str, values: Sequence[float], signature: str = "") -> Statistics:
    return ratio(name, values, [1.0] * len(values), signature)


def _equal(name: str) -> Metric:
    """The fraction of answers that equal a reference, apart from surrounding whitespace."""

    def metric(answers: Texts, references: References, examples: Sequence[Example]) -> Statistics:
        same = [answer.strip() in {r.strip() for r in refs} for answer, refs in zip(answers, references, strict=True)]
        return _mean(name, same)

    return metric


def edit_distance(answers: Texts, references: References, examples: Sequence[Example]) -> Statistics:
    """Mean Levenshtein distance divided by the length of the longer text; 0 for equal texts, lower is better."""
    of = Levenshtein.normalized_distance
    nearest = [min(of(answer, r) for r in refs) for answer, refs in zip(answers, references, strict=True)]
    return _mean("edit_distance", nearest, _version("rapidfuzz"))


def _rouge(name: str) -> Metric:
    """Mean ROUGE F-measure against the best reference, 0 to 1 (Lin 2004), with Porter's stemmer.

    For English only: words consist of the letters a to z and digits.
    """
    kind = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}[name]

    def metric(answers: Texts, references: References, examples: Sequence[Example]) -> Statistics:
        scorer = RougeScorer([kind], use_stemmer=True)
        best = [scorer.score_multi(refs, answer)[kind].fmeasure
                for answer, refs in zip(answers, references, strict=True)]  # fmt: skip
        return _mean(name, best, f"{_version('rouge-score')}|stemmer:porter|refs:best")

    return metric


def _sacrebleu(name: str, make: Callable[[], Any]) -> Metric:
    """A corpus metric of sacrebleu (Post 2018), 0 to 100, from the statistics that its significance tests use."""

    def metric(answers: Texts, references: References, examples: Sequence[Example]) -> Statistics:
        own = make()
        most = max(map(len, references))
        streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
        parts = np.array(own._extract_corpus_statistics(answers, streams), np.float64)

        def of_sums(sums: np.ndarray) -> np.ndarray:
            return np.array([own._compute_score_from_stats(row).score for row in sums.tolist()])

        return Statistics(name, parts, of_sums, signature=str(own.get_signature()))

    return metric


def f1(answers: Texts, references: References, examples: Sequence[Example]) -> Statistics:
    """F1, 0 to 1: of entities if the examples have `tokens`, else of labels."""
    of_entities = all("tokens" in example.values for example in examples)
    return _f1_of_entities(answers, references, examples) if of_entities else _f1_of_labels(answers, references)


def _f1_of_entities(answers: Texts, references: References, examples: Sequence[Example]) -> Statistics:
    """Micro-average over entities; correct ones have the same words and type (the default mode of seqeval)."""
    rows = []
    for answer, refs, example in zip(answers, references, examples, strict=True):
        tokens = example.values["tokens"].split()
        made, true = (set(get_entities(tags_of(text, tokens))) for text in (answer, refs[0]))
        rows.append([len(made & true), len(made) + len(true)])
    parts = np.array(rows, np.float64)
    # 0 if there are no entities at all, as in seqeval
    signature = f"{_version('seqeval')}|mode:default|average:micro"
    return Statistics("f1", parts, lambda s: 2 * s[:, 0] / np.maximum(s[:, 1], 1), signature=signature)


def _f1_of_labels(answers: Texts, references: References) -> Statistics:
    """Macro-average over labels, as in scikit-learn."""
    predicted = [text.strip() for text in answers]
    true = [refs[0].strip() for refs in references]
    labels = sorted({*predicted, *true})
    is_predicted, is_true = (np.array([[x == label for label in labels] for x in texts]) for texts in (predicted, true))
    parts = np.stack([is_predicted & is_true, is_predicted, is_true], 1).astype(np.float64)  # [examples, 3, labels]

    def of_sums(sums: np.ndarray) -> np.ndarray:
        correct, predicted, true = np.moveaxis(sums.reshape(-1, 3, len(labels)), 1, 0)
        occurs = predicted + true > 0  # F1 is undefined for a label that does not occur in a sample
        return (2 * correct / np.maximum(predicted + true, 1)).sum(1) / occurs.sum(1)

    return Statistics("f1", parts.reshape(len(parts), -1), of_sums, signature="average:macro")


def _version(library: str) -> str:
    return f"{library}:{metadata.version(library)}"


bleu_of_a_text = _sacrebleu("bleu", partial(BLEU, effective_order=True))  # a short text may have no 4-grams

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
