"""Metrics over steps: smoothed, and over seeds as a mean with a band."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptjax.lab.records import RunRecord
from gptjax.lab.variants import Variant

POINTS = 240  # per curve: as many as a page can show


@dataclass(frozen=True)
class Curve:
    """A metric over steps; each array is float64 [points]."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray  # the lowest seed
    high: np.ndarray  # the highest seed


@dataclass(frozen=True)
class Curves:
    """One metric of a variant."""

    finished: Curve | None  # the mean of its finished runs; None if there are none
    unfinished: tuple[Curve, ...]  # one for each other run


def curves(variant: Variant, metric: str) -> Curves:
    """The curves of `loss` (training, smoothed) or another metric of metrics.jsonl."""
    finished = []
    unfinished = []
    for record in variant.records:
        curve = _run_curve(record, metric)
        if len(curve.steps) and record.state == "finished":
            finished.append(curve)
        elif len(curve.steps):
            unfinished.append(curve)
    return Curves(_mean_curve(finished) if finished else None, tuple(unfinished))


def _run_curve(record: RunRecord, metric: str) -> Curve:
    points = {x["step"]: x[metric] for x in record.metrics() if isinstance(x.get(metric), int | float)}
    steps = np.array(list(points), np.float64)
    values = np.array(list(points.values()), np.float64)
    order = np.argsort(steps)
    order = order[np.isfinite(values[order])]
    steps, values = steps[order], values[order]
    if metric == "loss" and len(values):
        values = smooth(values)
    keep = np.unique(np.linspace(0, len(steps) - 1, min(POINTS, len(steps))).round().astype(int))
    return Curve(steps[keep], values[keep], values[keep], values[keep])


def _mean_curve(runs: Sequence[Curve]) -> Curve:
    """Mean, lowest and highest of several runs, over the steps that all of them have."""
    steps = np.unique(np.concatenate([c.steps for c in runs]))
    steps = steps[(steps >= max(c.steps[0] for c in runs)) & (steps <= min(c.steps[-1] for c in runs))]
    values = np.stack([np.interp(steps, c.steps, c.mean) for c in runs])
    return Curve(steps, values.mean(0), values.min(0), values.max(0))


def smooth(values: np.ndarray) -> np.ndarray:
    """A weighted moving average: a triangular kernel over about a tenth of the values on each side."""
    radius = max(1, len(values) // 10)
    kernel = 1 - np.abs(np.arange(-radius, radius + 1)) / (radius + 1)
    inner = slice(radius, radius + len(values))
    total = np.convolve(values, kernel)[inner]
    weight = np.convolve(np.ones(len(values)), kernel)[inner]
    return total / weight


def limits(shown: Sequence[Curve]) -> tuple[float, float]:
    """Lowest and highest value of the y axis.

    A loss falls from far above, and that must not flatten the rest: values above those of every curve after 5% of its
    steps are cut off.
    """
    low = min(float(c.low.min()) for c in shown)
    high = max(float(np.interp(c.steps[0] + 0.05 * (c.steps[-1] - c.steps[0]), c.steps, c.high)) for c in shown)
    last = max(float(c.high[-1]) for c in shown)
    high = max(high, last, low + 1e-3)
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two values, about `about` of them."""
    raw = (high - low) / about
    size = 10.0 ** np.floor(np.log10(raw))
    step = size * next(m for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first = np.ceil(low / step - 1e-9)
    return [float(round(x, 12)) for x in np.arange(first, np.floor(high / step + 1e-9) + 1) * step]
