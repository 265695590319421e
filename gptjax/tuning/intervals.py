"""What chance does to a figure: intervals of a mean over runs, and how many runs would be enough to tell.

The only file that needs scipy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = (2.5, 97.5)  # percentiles between which 95% of the resampled values lie
LOWER_IS_BETTER = frozenset({"edit_distance", "loss", "bits_per_byte"})
ENOUGH = 12  # runs from which their own distribution is resampled; fewer say too little of its shape
RESAMPLES = 9999
STUDENT, BOOTSTRAP = "Student's t", "studentized bootstrap"
POWER = 0.8  # chance with which a difference should be found, where it is as large as it looks
MOST = 1000  # runs beyond which nobody asks how many


@dataclass(frozen=True)
class Score:
    """A value with its 95% interval."""

    name: str
    value: float
    low: float
    high: float
    signature: str = ""  # what must be known to get the same value elsewhere

    @property
    def higher_is_better(self) -> bool:
        return self.name not in LOWER_IS_BETTER


def over_runs(name: str, values: Sequence[float]) -> Score:
    """The mean of a figure over runs that differ in their seed alone, with its 95% interval; how, says `signature`.

    Of paired runs give the differences. A single run has no interval: NaN. Fewer than `ENOUGH` have that of Student's
    t: resampling 2 to 5 values gives intervals that miss the truth two to five times as often as they say. More have
    the studentized bootstrap (Efron and Tibshirani 1993, chapter 12), which needs no bell-shaped distribution.
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
    """Percentiles of t = (mean of a resample - mean) / its error; None where a resample is of equal values only."""
    drawn = x[np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))]
    errors = drawn.std(1, ddof=1) / math.sqrt(len(x))
    if (errors <= 1e-12 * np.abs(x).max()).any():
        return None
    low, high = map(float, np.percentile((drawn.mean(1) - x.mean()) / errors, LEVEL))
    return low, high


def runs_needed(values: Sequence[float]) -> float:
    """How many runs in all let a t test find a mean such as this one not 0, with a chance of `POWER`.

    From the mean and the spread of what is there, which few runs tell roughly. NaN for a single run, whose spread is
    not known; infinity above `MOST`. The power is that of the noncentral t distribution.
    """
    if len(values) < 2:
        return math.nan
    spread = float(np.std(values, ddof=1))
    effect = abs(float(np.mean(values))) / spread if spread else 0.0
    if not effect:
        return math.inf
    counts = np.arange(2, MOST + 1)
    bound = stats.t.ppf(LEVEL[1] / 100, counts - 1)
    distance = np.minimum(effect * np.sqrt(counts), 30)  # in standard errors; further off scipy's nct is not exact
    power = stats.nct.sf(bound, counts - 1, distance)  # the other side adds less than 1 in 1000
    found = np.flatnonzero(power >= POWER)
    return float(counts[found[0]]) if len(found) else math.inf
