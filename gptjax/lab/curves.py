"""Curves of runs over their steps: smoothed, and over seeds as a mean in a band."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptjax.lab.records import Record
from gptjax.lab.variants import Variant, seed_of

POINTS = 240  # of a curve, as many as a page can show


@dataclass(frozen=True)
class Curve:
    """A figure over steps; each float64 [points]."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray  # the lowest seed
    high: np.ndarray  # the highest seed


@dataclass(frozen=True)
class Curves:
    """One figure of a variant."""

    whole: Curve | None  # of its finished runs; None where there are none
    parts: tuple[Curve, ...]  # each run that has not finished, by itself


def curves(variant: Variant, figure: str) -> Curves:
    """`loss` (training, smoothed) or another figure of metrics.jsonl of a variant."""
    each = {seed_of(r): c for r in variant.finished if len((c := _of_run(r, figure)).steps)}
    parts = [c for r in variant.records if r.state != "finished" and len((c := _of_run(r, figure)).steps)]
    return Curves(_over(list(each.values())) if each else None, tuple(parts))


def _of_run(record: Record, figure: str) -> Curve:
    points = {x["step"]: x[figure] for x in record.metrics() if isinstance(x.get(figure), int | float)}
    steps, values = (np.array(x, np.float64) for x in (list(points), list(points.values())))
    order = np.argsort(steps)
    steps, values = steps[order], values[order]
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if figure == "loss" and len(values):
        values = smooth(values)
    keep = np.unique(np.linspace(0, len(steps) - 1, min(POINTS, len(steps))).round().astype(int))
    return Curve(steps[keep], values[keep], values[keep], values[keep])


def _over(runs: Sequence[Curve]) -> Curve:
    """Mean, lowest and highest of several runs, from where all have begun to where the first of them ends."""
    steps = np.unique(np.concatenate([c.steps for c in runs]))
    steps = steps[(steps >= max(c.steps[0] for c in runs)) & (steps <= min(c.steps[-1] for c in runs))]
    values = np.stack([np.interp(steps, c.steps, c.mean) for c in runs])
    return Curve(steps, values.mean(0), values.min(0), values.max(0))


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of what lies around each value, nearer values counting more, over about a tenth of them on each side."""
    reach = max(1, len(values) // 10)
    kernel = 1 - np.abs(np.arange(-reach, reach + 1)) / (reach + 1)
    total, weight = (np.convolve(x, kernel)[reach : reach + len(values)] for x in (values, np.ones(len(values))))
    return total / weight


def limits(shown: Sequence[Curve]) -> tuple[float, float]:
    """Lowest and highest value to draw: a loss falls from far above, which must not flatten what is compared.

    So what lies above every curve's value after a twentieth of its steps is left outside.
    """
    low = min(float(c.low.min()) for c in shown)
    high = max(float(np.interp(c.steps[0] + 0.05 * (c.steps[-1] - c.steps[0]), c.steps, c.high)) for c in shown)
    last = max(float(c.high[-1]) for c in shown)
    high = max(high, last, low + 1e-3)
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two values."""
    raw = (high - low) / about
    size = 10.0 ** np.floor(np.log10(raw))
    step = size * next(m for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first = np.ceil(low / step - 1e-9)
    return [float(round(x, 12)) for x in np.arange(first, np.floor(high / step + 1e-9) + 1) * step]
