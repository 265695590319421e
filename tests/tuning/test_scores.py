"""Each metric against its library called plainly, and the intervals against what they promise."""

import numpy as np
import pytest

from gptjax.data.tasks import Example, TextPart

pytest.importorskip("sacrebleu", reason="the extra `tasks` is not installed")
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score

from gptjax.tuning import scores
from gptjax.tuning.scores import METRICS, difference, ratio, score

ANSWERS = [
    "The cat sat on the mat today .",
    "",
    "two dogs are running in the park",
    "A completely different sentence stands here!",
    "the end of the long story is near",
    "no",
]
REFERENCES = [
    ("The cat sat on a mat today .", "A cat was sitting on the mat ."),
    ("Something should have been said here",),
    ("Two dogs run through the park", "two dogs are running in a park", "dogs!"),
    ("None of these words occurs over there",),
    ("the end of the long story is near",),
    ("yes", "no"),
]
NOWHERE = [Example((TextPart("x", True),), "f:1")] * len(ANSWERS)


def measure(metric, answers=ANSWERS, references=REFERENCES):
    return METRICS[metric](answers, references, NOWHERE[: len(answers)])


def streams(references):
    """The references as sacrebleu has them: the first of each answer, the second of each, and so on."""
    return [[r[i] if i < len(r) else None for r in references] for i in range(max(map(len, references)))]


@pytest.mark.parametrize("metric, of", [("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)])
def test_corpus_metrics_are_those_of_sacrebleu_also_on_every_resample(metric, of):
    pieces = measure(metric)
    assert pieces.value == pytest.approx(of(ANSWERS, streams(REFERENCES)).score)
    assert pieces.signature.startswith("nrefs:var|case:mixed|") and "|version:" in pieces.signature
    rng = np.random.default_rng(0)
    resampled = scores._resampled_sums(pieces.parts, seed=0)
    for sums in resampled[:30]:
        drawn = rng.integers(len(ANSWERS), size=len(ANSWERS))
        expected = of([ANSWERS[i] for i in drawn], streams([REFERENCES[i] for i in drawn])).score
        assert pieces.of_sums(sums[None])[0] == pytest.approx(expected)


@pytest.mark.parametrize("metric, kind", [("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")])
def test_rouge_is_the_mean_f_measure_of_the_best_reference(metric, kind):
    one = RougeScorer([kind], use_stemmer=True)
    best = [max(one.score(r, a)[kind].fmeasure for r in refs) for a, refs in zip(ANSWERS, REFERENCES, strict=True)]
    assert measure(metric).each == pytest.approx(best) and measure(metric).value == pytest.approx(np.mean(best))
    assert len(set(best)) > 2


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(row[-1] + 1, above[j] + 1, above[j - 1] + (x != y)))
    return row[-1]


def test_edit_distance_is_levenshteins_to_the_nearest_reference_and_lower_is_better():
    nearest = [min(levenshtein(a, r) / max(len(a), len(r)) for r in refs)
               for a, refs in zip(ANSWERS, REFERENCES, strict=True)]  # fmt: skip
    assert measure("edit_distance").each == pytest.approx(nearest)
    assert not score(measure("edit_distance")).higher_is_better and score(measure("accuracy")).higher_is_better


def test_equality_takes_any_reference_and_leaves_the_space_around_it_out():
    assert measure("exact_match").each.tolist() == [0, 0, 0, 0, 1, 1]
    made, true = ["good", " bad\n", "good", "odd"], ["good", "bad", "bad", "odd"]
    value = measure("accuracy", made, [(t,) for t in true]).value
    assert value == accuracy_score(true, [m.strip() for m in made]) == 0.75


@pytest.mark.slow
def test_intervals_of_95_percent_hold_the_truth_about_that_often_and_do_not_change():
    rng, truth, held = np.random.default_rng(0), 0.7, []
    for _ in range(200):
        s = score(ratio("accuracy", rng.random(150) < truth, np.ones(150)))
        assert s.low <= s.value <= s.high
        held.append(s.low <= truth <= s.high)
    assert 0.90 <= np.mean(held) <= 0.98
    pieces = measure("chrf")
    assert score(pieces, seed=3) == score(pieces, seed=3) != score(pieces, seed=4)


def test_a_paired_difference_is_narrower_than_the_parts_and_tells_better_from_chance():
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    a, b, c = (ratio("accuracy", hard < share, np.ones(400)) for share in (0.60, 0.52, 0.60))
    d, alone = difference(a, b), score(a)
    assert d.value == pytest.approx(a.value - b.value) and 0 < d.low < d.value < d.high
    assert d.high - d.low < 0.8 * (alone.high - alone.low)
    assert (difference(a, c).value, difference(a, c).low, difference(a, c).high) == (0, 0, 0)
    other = ratio("accuracy", rng.random(400) < 0.60, np.ones(400))
    assert difference(a, other).low < 0 < difference(a, other).high
    with pytest.raises(AssertionError, match="the same examples"):
        difference(a, ratio("accuracy", np.ones(3), np.ones(3)))


def test_what_is_said_in_one_dialogue_is_resampled_together():
    """Twenty answers that repeat what two dialogues say are no more certain than those two."""
    values, groups = np.repeat([0.0, 1.0], 10), np.repeat([0, 1], 10)
    pieces = ratio("m", values, np.ones(20))
    alone, together = score(pieces), score(pieces.grouped(groups))
    assert alone.value == together.value == 0.5
    assert (together.low, together.high) == (0, 1) and alone.low > 0.2
    loss = ratio("loss", [6.0, 2.0, 4.0], [3, 1, 1])
    assert loss.value == loss.grouped([0, 0, 1]).value == 12 / 5, "tokens count alike, not answers"
