"""Poisson subsampling, which DP-SGD draws its batches by."""

import math
from typing import NamedTuple

import numpy as np

from gptjax.random_streams import POISSON

MARGIN_SIGMAS = 5.0  # standard deviations of the batch size between its mean and `PoissonSampler.max_batch`


class PoissonSampler(NamedTuple):
    """Draws the batches of DP-SGD (Abadi et al. 2016): every window is in a batch with the same probability."""

    num_windows: int  # in one plain pass, whose cuts never move
    sampling_rate: float  # probability that a window is in a batch
    max_batch: int  # most windows that a batch can hold

    @classmethod
    def of(cls, num_windows: int, max_batch: int) -> "PoissonSampler":
        """Leaves `MARGIN_SIGMAS` standard deviations between the mean and `max_batch`: truncation costs privacy."""
        expected = ((math.sqrt(MARGIN_SIGMAS**2 + 4 * max_batch) - MARGIN_SIGMAS) / 2) ** 2
        rate = 1.0 if num_windows <= max_batch else expected / num_windows
        return cls(num_windows, rate, max_batch)

    @property
    def expected_batch(self) -> float:
        """Mean number of windows in a batch."""
        return self.sampling_rate * self.num_windows

    def draw(self, seed: int, step: int) -> np.ndarray:
        """Indices of the windows of a step, int64 [at most `max_batch`]; a random choice where there are too many."""
        rng = np.random.default_rng((seed, POISSON, step))
        drawn = np.flatnonzero(rng.random(self.num_windows) < self.sampling_rate)
        return rng.permutation(drawn)[: self.max_batch]
