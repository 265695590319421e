"""Scaling laws: the loss as a sum of falling powers of what was spent, fitted to runs.

One form serves both laws of the literature. With one column, the compute C, it is L(C) = a C^b + c (Henighan et al.
2020; OpenAI 2023, section 3); with two, parameters N and tokens D, it is L(N, D) = A / N^alpha + B / D^beta + E
(Hoffmann et al. 2022, equation 2). The fit is theirs, too: log L under Huber's loss, from many starts.
"""

import itertools
from dataclasses import dataclass

import numpy as np

# Where Huber's loss turns from squares to lines, in log L. Seeds differ by about half a per cent, which is to be
# averaged, and a run that went wrong by much more. Hoffmann et al. take 1e-3: of ten runs that is
# nearly a curve through three.
HUBER = 1e-2
STEEPEST, FLATTEST = -3.0, -1e-3  # exponents outside are no scaling law
SMALLEST_FLOOR = 1e-4  # c, as a share of the lowest loss
STEPS = 300  # of the descent at most


@dataclass(frozen=True)
class Law:
    """L(x) = c + sum_i a_i (x_i / unit_i)^b_i."""

    a: tuple[float, ...]  # the part of the loss that still falls, at x = unit; nats
    b: tuple[float, ...]  # exponents, negative
    c: float  # what no x takes away; nats
    unit: tuple[float, ...]  # of each column: the geometric mean of what was fitted, so that a and b are told apart

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Losses [points] at x [points, columns]."""
        return self.c + (np.array(self.a) * (x / np.array(self.unit)) ** np.array(self.b)).sum(1)


def can_fit(x: np.ndarray) -> bool:
    """Whether x [points, columns] has more different points than a law has parameters, and columns that part.

    Where N and D rise together, nothing tells which of them lowers the loss.
    """
    z = np.log(x)
    z = z - z.mean(0)
    if len(np.unique(x, axis=0)) <= 1 + 2 * x.shape[1] or not z.std(0).all():
        return False
    return bool(np.linalg.svd(z / z.std(0), compute_uv=False)[-1] ** 2 > 0.1 * len(x))


def fit(x: np.ndarray, losses: np.ndarray) -> Law:
    """The law nearest to losses [points] at x [points, columns], the best from many starts."""
    unit = np.exp(np.log(x).mean(0))
    starts = _starts(losses, x.shape[1])
    fitted, costs = _descend(np.log(x / unit), np.tile(losses, (len(starts), 1)), starts)
    return _law(fitted[costs.argmin()], unit)


def _law(p: np.ndarray, unit: np.ndarray) -> Law:
    a, b, c = np.exp(p[: len(unit)]), p[len(unit) : -1], np.exp(p[-1])
    return Law(tuple(a.tolist()), tuple(b.tolist()), float(c), tuple(unit.tolist()))


def _starts(losses: np.ndarray, columns: int) -> np.ndarray:
    """Gentle and steep exponents, low and high floors: (log a, b, log c) [starts, 2 columns + 1]."""
    made = []
    for share, b in itertools.product((0.01, 0.4, 0.8), itertools.product((-0.05, -0.2, -0.6), repeat=columns)):
        c = share * losses.min()
        a = (np.exp(np.log(losses).mean()) - c) / columns
        made.append([*[np.log(a)] * columns, *b, np.log(c)])
    return np.array(made)


def _descend(z: np.ndarray, losses: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg and Marquardt's method with Huber's weights, for many fits at once: a bootstrap is a thousand of them.

    z [points, columns] are logarithms of x, losses [fits, points], p [fits, parameters] where each begins; returns
    where each ends and its cost.
    """
    columns = z.shape[1]
    lowest = np.log(losses.min(1, keepdims=True))
    low = np.concatenate([np.tile([-20.0] * columns + [STEEPEST] * columns, (len(p), 1)),
                          lowest + np.log(SMALLEST_FLOOR)], 1)  # fmt: skip
    high = np.concatenate([np.tile([10.0] * columns + [FLATTEST] * columns, (len(p), 1)), lowest], 1)
    p, damping = p.clip(low, high), np.full(len(p), 1e-3)
    r, slopes = _residuals(z, losses, p)
    for _ in range(STEPS):
        weights = np.minimum(1, HUBER / np.maximum(np.abs(r), 1e-300))
        gradient = np.einsum("fnp,fn->fp", slopes, weights * r)
        held = ((p <= low) & (gradient > 0)) | ((p >= high) & (gradient < 0))  # at a bound, and pushed against it
        free = np.where(held[:, None], 0, slopes)
        curvature = np.einsum("fnp,fn,fnq->fpq", free, weights, free)
        damped = curvature + np.eye(p.shape[1]) * (damping[:, None] * np.einsum("fpp->fp", curvature) + 1e-12)[:, None]
        step = np.linalg.solve(damped, np.where(held, 0, gradient)[..., None])
        new = (p - step[..., 0]).clip(low, high)
        new_r, new_slopes = _residuals(z, losses, new)
        better = _cost(new_r) < _cost(r)
        moved = np.abs(new - p).max(1)
        p, r = np.where(better[:, None], new, p), np.where(better[:, None], new_r, r)
        slopes = np.where(better[:, None, None], new_slopes, slopes)
        damping = np.where(better, damping / 5, damping * 4).clip(1e-9, 1e9)
        if (moved < 1e-9).all():
            break
    return p, _cost(r)


def _residuals(z: np.ndarray, losses: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What log L is fitted too high by [fits, points], and its slopes [fits, points, parameters]."""
    columns = z.shape[1]
    falling = np.exp(p[:, None, :columns] + z * p[:, None, columns:-1])
    floor = np.broadcast_to(np.exp(p[:, None, -1:]), (*losses.shape, 1))
    total = falling.sum(-1) + floor[..., 0]
    return np.log(total / losses), np.concatenate([falling, falling * z, floor], -1) / total[..., None]


def _cost(r: np.ndarray) -> np.ndarray:
    """Huber's loss, summed over the points: [fits]."""
    size = np.abs(r)
    return np.where(size <= HUBER, size**2 / 2, HUBER * (size - HUBER / 2)).sum(1)


def residuals_of(law: Law, x: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """What losses differ from a law by, in log L [points]: centred, and widened for the parameters that were fitted."""
    r = np.log(losses / law(x))
    return (r - r.mean()) * np.sqrt(len(r) / max(1, len(r) - 1 - 2 * x.shape[1]))


def bootstrap(
    law: Law, x: np.ndarray, losses: np.ndarray, at: np.ndarray, draws: int = 1000, seed: int = 0
) -> tuple[np.ndarray, list[Law]]:
    """Losses that a new run at `at` [columns] might have [draws], and the laws behind them.

    A bootstrap of residuals (Efron & Tibshirani 1993, chapter 9): to the fitted losses residuals are added that are
    drawn from all of them, a law is fitted to the sum, and to what it predicts another residual is added, as the new
    run has a seed as well. It knows of seeds and of the parameters, not of a form that is wrong beyond the last run.
    """
    rng = np.random.default_rng(seed)
    r, unit = residuals_of(law, x, losses), np.array(law.unit)
    drawn = law(x) * np.exp(rng.choice(r, (draws, len(r))))
    start = np.log([*law.a, law.c])
    start = np.concatenate([start[:-1], law.b, start[-1:]])
    fitted, _ = _descend(np.log(x / unit), drawn, np.tile(start, (draws, 1)))
    laws = [_law(p, unit) for p in fitted]
    centre = np.array([made(at[None])[0] for made in laws])
    return centre * np.exp(rng.choice(r, draws)), laws


def interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The middle part of values [draws, ...], by percentiles."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0).tolist()
    return low, high
