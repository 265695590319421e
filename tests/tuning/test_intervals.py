"""Intervals over runs: those of the textbook, and right as often as they say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gptjax.tuning.intervals import BOOTSTRAP, ENOUGH, STUDENT, over_runs, runs_needed

numbers = st.floats(-100, 100).map(lambda x: round(x, 3))


def test_the_interval_over_few_runs_is_that_of_a_t_test():
    values = [0.61, 0.66, 0.60]
    found, expected = over_runs("accuracy", values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(expected)) and found.signature == STUDENT
    assert found.value == pytest.approx(np.mean(values))
    assert np.isnan(over_runs("accuracy", [0.6]).low)  # one run tells nothing about others


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=ENOUGH - 1))
def test_of_pairs_it_is_that_of_a_paired_t_test(pairs):
    a, b = np.array(pairs).T
    found = over_runs("loss", list(a - b))
    if np.std(a - b) > 1e-6:
        expected = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-6, abs=1e-9)


@given(st.lists(numbers, min_size=1, max_size=20), numbers, st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_it_moves_and_stretches_with_the_values(values, move, stretch):
    a, b = over_runs("loss", values), over_runs("loss", [move + stretch * x for x in values])
    if np.std(values) > 1e-3:
        assert (b.value, b.low, b.high) == pytest.approx(
            [move + stretch * x for x in (a.value, a.low, a.high)], abs=1e-6
        )
        assert a.low < a.value < a.high
    else:
        assert math.isnan(a.low) or a.low <= a.value <= a.high


def coverage(draw, mean: float, count: int, repeats: int) -> float:
    rng = np.random.default_rng(1)
    found = [over_runs("loss", draw(rng, count)) for _ in range(repeats)]
    return float(np.mean([s.low <= mean <= s.high for s in found]))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_intervals_of_few_runs_hold_the_truth_as_often_as_they_say(count):
    share = coverage(lambda rng, n: rng.normal(3, 0.1, n), 3, count, 1500)
    assert 0.935 < share < 0.965  # 0.95, and 2.6 standard errors of 1500 repeats


def test_so_do_those_of_many_runs_where_the_spread_is_lopsided():
    skewed = lambda rng, n: rng.exponential(1.0, n)  # noqa: E731
    share = coverage(skewed, 1, 15, 120)
    assert over_runs("loss", skewed(np.random.default_rng(0), 15)).signature == BOOTSTRAP
    assert share > 0.9
    rng = np.random.default_rng(1)
    intervals = [stats.ttest_1samp(skewed(rng, 15), 0).confidence_interval() for _ in range(120)]
    assert share > np.mean([low <= 1 <= high for low, high in intervals]), "that is what it is for"


def test_a_percentile_bootstrap_of_three_runs_would_be_wrong_five_times_as_often():
    """Why there is none: its intervals are too narrow."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 3))
    drawn = x[np.arange(500)[:, None, None], rng.integers(3, size=(500, 400, 3))].mean(-1)
    low, high = np.percentile(drawn, (2.5, 97.5), axis=1)
    assert np.mean((low > 0) | (high < 0)) > 0.15


def test_resamples_without_spread_leave_students_t():
    found = over_runs("accuracy", [1.0] * 13 + [0.0])
    assert found.signature == STUDENT and np.isfinite([found.low, found.high]).all()
    assert over_runs("accuracy", [1.0] * 14).low == 1.0


@pytest.mark.parametrize("first", [2, 3])
@pytest.mark.parametrize("effect", [0.7, 1.0, 2.0])
def test_the_promised_number_of_runs_decides_it_in_four_of_five_simulations(first, effect):
    """Of sweeps whose first runs decide nothing, and whose runs go on to the number that they promise."""
    rng = np.random.default_rng(0)
    decided = []
    while len(decided) < 150:
        runs = rng.normal(effect, 1, 1000)
        if stats.ttest_1samp(runs[:first], 0).pvalue <= 0.05:
            continue
        needed = runs_needed(list(runs[:first]))
        if np.isfinite(needed):
            decided.append(stats.ttest_1samp(runs[: max(int(needed), first + 1)], 0).pvalue <= 0.05)
    assert np.mean(decided) > 0.8


def test_what_cannot_be_known_of_the_number_of_runs():
    assert math.isnan(runs_needed([0.3])) and math.isinf(runs_needed([0.1, -0.1])) and math.isinf(runs_needed([0, 0]))
    assert math.isinf(runs_needed([1.0, -0.999]))
    assert runs_needed([1.0, 1.0001]) <= 3 < runs_needed([1.0, 1.2]), "two runs say little of the noise"
