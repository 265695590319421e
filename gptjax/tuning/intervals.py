"""Confidence intervals of a mean over runs, and how many runs a significant difference needs.

The only file that imports scipy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = (2.5, 97.5)  # percentiles that bound a 95% interval
LOWER_IS_BETTER = frozenset({"edit_distance", "loss", "bits_per_byte"})
ENOUGH = 12  # fewest runs for the bootstrap: the shape of the distribution is unknown with fewer
RESAMPLES = 9999
STUDENT, BOOTSTRAP = "Student's t", "studentized bootstrap"
POWER = 0.8  # probability of finding a difference that is as large as the observed one
MOST = 1000  # largest number of runs considered


@dataclass(frozen=True)
class Score:
    """A value with its 95% interval."""

    name: str
    value: float
    low: float
    high: float
    signature: str = ""  # settings that are needed to reproduce the value

    @property
    def higher_is_better(self) -> bool:
        return self.name not in LOWER_IS_BETTER


def over_runs(name: str, values: Sequence[float]) -> Score:
    """The mean over runs that differ only in their seed, with a 95% interval; `signature` names the method.

    For paired runs, pass the differences. A single run has no interval (NaN). With fewer than `ENOUGH` runs, it is
    Student's t interval: a bootstrap of 2 to 5 values misses the true mean two to five times as often as it claims.
    With more, it is the studentized bootstrap (Efron and Tibshirani 1993, chapter 12), which needs no normality.
    """
    x = np.asarray(values, np.float64)
    mean, count = float(x.mean()), len(x)
    if count == 1:
        return Score(name, mean, math.nan, math.nan)
    error = float(x.std(ddof=1)) / math.sqrt(count)
    quantiles = _resampled_t(x) if count >= ENOUGH else None
    if quantiles is None:
        reach = float(stats.t.ppf(LEVEL[1] / 100, count - 1)) * error
        return Score(name, mean, mean - reach, mean + reach, STUDENT)
    return Score(name, mean, mean - quantiles[1] * error, mean - quantiles[0] * error, BOOTSTRAP)


def _resampled_t(x: np.ndarray) -> tuple[float, float] | None:
    """Percentiles of t = (mean of a resample - mean) / its error; None if a resample has equal values only."""
    drawn = x[np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))]
    errors = drawn.std(1, ddof=1) / math.sqrt(len(x))
    if (errors <= 1e-12 * np.abs(x).max()).any():
        return None
    low, high = map(float, np.percentile((drawn.mean(1) - x.mean()) / errors, LEVEL))
    return low, high


def runs_needed(values: Sequence[float]) -> float:
    """A total number of runs with which a t test finds that the mean is not 0, with probability `POWER`.

    Assumes the mean of the given runs, and the upper end of the one-sided interval of their deviation at `POWER`
    (chi-squared): few runs often show too little noise, and would promise too little. NaN for a single run, whose
    deviation is unknown; infinity above `MOST`. Uses the noncentral t distribution.
    """
    if len(values) < 2:
        return math.nan
    freedom = len(values) - 1
    spread = float(np.std(values, ddof=1)) * math.sqrt(freedom / stats.chi2.ppf(1 - POWER, freedom))
    effect = abs(float(np.mean(values))) / spread if spread else 0.0
    if not effect:
        return math.inf
    counts = np.arange(2, MOST + 1)
    bound = stats.t.ppf(LEVEL[1] / 100, counts - 1)
    distance = np.minimum(effect * np.sqrt(counts), 30)  # in standard errors; beyond 30 scipy's nct is inexact
    power = stats.nct.sf(bound, counts - 1, distance)  # the other tail adds less than 0.001
    found = np.flatnonzero(power >= POWER)
    return float(counts[found[0]]) if len(found) else math.inf
