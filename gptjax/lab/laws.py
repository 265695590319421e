"""Scaling laws: the loss as a sum of power laws, fitted to runs.

One form covers both laws of the literature. With one column, the compute C, it is L(C) = a C^b + c (Henighan et al.
2020; OpenAI 2023, section 3); with two, parameters N and tokens D, it is L(N, D) = A / N^alpha + B / D^beta + E
(Hoffmann et al. 2022, equation 2). As in the latter, log L is fitted under the Huber loss from many initial values.
"""

import itertools
from dataclasses import dataclass

import numpy as np

# Where the Huber loss changes from quadratic to linear, in log L. Seeds differ by about 0.5%, which should be averaged;
# a run that went wrong differs by much more. Hoffmann et al. use 1e-3; with ten runs such a fit nearly passes through
# three of them and ignores the rest.
HUBER = 1e-2
STEEPEST, FLATTEST = -3.0, -1e-3  # bounds of the exponents
MIN_FLOOR = 1e-4  # of c, relative to the lowest loss
STEPS = 300  # of the optimisation at most


@dataclass(frozen=True)
class Law:
    """L(x) = c + sum_i a_i (x_i / unit_i)^b_i."""

    a: tuple[float, ...]  # the reducible loss of each column at x = unit; nats/token
    b: tuple[float, ...]  # exponents, negative
    c: float  # the irreducible loss; nats/token
    unit: tuple[float, ...]  # of each column: the geometric mean of the fitted x, which decorrelates a and b

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Losses [points] at x [points, columns]."""
        return self.c + (np.array(self.a) * (x / np.array(self.unit)) ** np.array(self.b)).sum(1)


def can_fit(x: np.ndarray) -> bool:
    """Whether x [points, columns] has more distinct points than a law has parameters, and no collinear columns.

    If N and D grow together, the data do not show which of them lowers the loss.
    """
    z = np.log(x)
    z = z - z.mean(0)
    if len(np.unique(x, axis=0)) <= 1 + 2 * x.shape[1] or not z.std(0).all():
        return False
    return bool(np.linalg.svd(z / z.std(0), compute_uv=False)[-1] ** 2 > 0.1 * len(x))


def fit(x: np.ndarray, losses: np.ndarray) -> Law:
    """Fits a law to losses [points] at x [points, columns]: the best fit from many initial values."""
    unit = np.exp(np.log(x).mean(0))
    starts = _initial_values(losses, x.shape[1])
    fitted, costs = _minimise(np.log(x / unit), np.tile(losses, (len(starts), 1)), starts)
    return _law(fitted[costs.argmin()], unit)


def _law(p: np.ndarray, unit: np.ndarray) -> Law:
    a, b, c = np.exp(p[: len(unit)]), p[len(unit) : -1], np.exp(p[-1])
    return Law(tuple(a.tolist()), tuple(b.tolist()), float(c), tuple(unit.tolist()))


def _initial_values(losses: np.ndarray, columns: int) -> np.ndarray:
    """Flat and steep exponents, low and high floors: (log a, b, log c) [starts, 2 columns + 1]."""
    values = []
    for share, b in itertools.product((0.01, 0.4, 0.8), itertools.product((-0.05, -0.2, -0.6), repeat=columns)):
        c = share * losses.min()
        a = (np.exp(np.log(losses).mean()) - c) / columns
        values.append([*[np.log(a)] * columns, *b, np.log(c)])
    return np.array(values)


def _minimise(z: np.ndarray, losses: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Levenberg-Marquardt method with Huber weights, for many fits at once: a bootstrap has a thousand.

    z [points, columns]: log x; losses [fits, points]; p [fits, parameters]: the initial values. Returns the fitted
    parameters and the cost of each fit.
    """
    columns = z.shape[1]
    lowest = np.log(losses.min(1, keepdims=True))
    low = np.concatenate([np.tile([-20.0] * columns + [STEEPEST] * columns, (len(p), 1)),
                          lowest + np.log(MIN_FLOOR)], 1)  # fmt: skip
    high = np.concatenate([np.tile([10.0] * columns + [FLATTEST] * columns, (len(p), 1)), lowest], 1)
    p = p.clip(low, high)
    damping = np.full(len(p), 1e-3)
    r, jacobian = _residuals(z, losses, p)
    for _ in range(STEPS):
        weights = np.minimum(1, HUBER / np.maximum(np.abs(r), 1e-300))
        gradient = np.einsum("fnp,fn->fp", jacobian, weights * r)
        at_bound = ((p <= low) & (gradient > 0)) | ((p >= high) & (gradient < 0))  # and pushed against it
        free = np.where(at_bound[:, None], 0, jacobian)
        curvature = np.einsum("fnp,fn,fnq->fpq", free, weights, free)
        damped = curvature + np.eye(p.shape[1]) * (damping[:, None] * np.einsum("fpp->fp", curvature) + 1e-12)[:, None]
        step = np.linalg.solve(damped, np.where(at_bound, 0, gradient)[..., None])
        new = (p - step[..., 0]).clip(low, high)
        new_r, new_jacobian = _residuals(z, losses, new)
        better = _cost(new_r) < _cost(r)
        moved = np.abs(new - p).max(1)
        p = np.where(better[:, None], new, p)
        r = np.where(better[:, None], new_r, r)
        jacobian = np.where(better[:, None, None], new_jacobian, jacobian)
        damping = np.where(better, damping / 5, damping * 4).clip(1e-9, 1e9)
        if (moved < 1e-9).all():
            break
    return p, _cost(r)


def _residuals(z: np.ndarray, losses: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fitted minus observed log L [fits, points], and the Jacobian [fits, points, parameters]."""
    columns = z.shape[1]
    falling = np.exp(p[:, None, :columns] + z * p[:, None, columns:-1])
    floor = np.broadcast_to(np.exp(p[:, None, -1:]), (*losses.shape, 1))
    total = falling.sum(-1) + floor[..., 0]
    return np.log(total / losses), np.concatenate([falling, falling * z, floor], -1) / total[..., None]


def _cost(r: np.ndarray) -> np.ndarray:
    """The Huber loss, summed over the points: [fits]."""
    size = np.abs(r)
    return np.where(size <= HUBER, size**2 / 2, HUBER * (size - HUBER / 2)).sum(1)


def residuals(law: Law, x: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Residuals in log L [points]: centred, and scaled up for the degrees of freedom of the fit."""
    r = np.log(losses / law(x))
    return (r - r.mean()) * np.sqrt(len(r) / max(1, len(r) - 1 - 2 * x.shape[1]))


def bootstrap(
    law: Law, x: np.ndarray, losses: np.ndarray, at: np.ndarray, draws: int = 1000, seed: int = 0
) -> tuple[np.ndarray, list[Law]]:
    """Simulated losses [draws] of a new run at `at` [columns], and the law of each draw.

    A bootstrap of residuals (Efron & Tibshirani 1993, chapter 9): random residuals are added to the fitted losses, a
    law is fitted to the sum, and another residual is added to its prediction, for the seed of the new run. This covers
    the noise between seeds and the uncertainty of the parameters, but not a law that fails beyond the largest run.
    """
    rng = np.random.default_rng(seed)
    r = residuals(law, x, losses)
    unit = np.array(law.unit)
    drawn = law(x) * np.exp(rng.choice(r, (draws, len(r))))
    start = np.log([*law.a, law.c])
    start = np.concatenate([start[:-1], law.b, start[-1:]])
    fitted, _ = _minimise(np.log(x / unit), drawn, np.tile(start, (draws, 1)))
    laws = [_law(p, unit) for p in fitted]
    centre = np.array([draw(at[None])[0] for draw in laws])
    return centre * np.exp(rng.choice(r, draws)), laws


def interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The central interval of values [draws, ...], by percentiles."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0).tolist()
    return low, high
