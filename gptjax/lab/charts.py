"""Small SVG charts inside a page. Its style sheet sets the colours: `c0` to `c7`, then the same ones dashed."""

import html
import math
from collections.abc import Sequence

import numpy as np

from gptjax.lab.curves import Curve, Curves, limits, ticks
from gptjax.tuning.intervals import Score

WIDTH, HEIGHT = 400, 260
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 8, 36  # margins around the curves
COLORS = 8


def color(number: int) -> str:
    """The CSS classes of a variant's colour."""
    return f"c{number % COLORS}" + (" dashed" if number // COLORS % 2 else "")


def line_chart(named: Sequence[tuple[str, Curves]], clip_id: str, description: str) -> str:
    """Mean curves with bands over seeds; unfinished runs are thin lines. Empty if there is no curve."""
    shown = [c for _, group in named for c in ((group.finished,) if group.finished else ()) + group.unfinished]
    if not shown:
        return ""
    low, high = limits(shown)
    first = min(c.steps[0] for c in shown)
    last = max(c.steps[-1] for c in shown)
    if first == last:
        first -= 1
        last += 1
    x = lambda step: LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    y = lambda value: TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    drawn = [f'<clipPath id="{clip_id}"><rect x="{LEFT}" y="{TOP - 4}" width="{WIDTH - LEFT - RIGHT + 4}" '
             f'height="{HEIGHT - TOP - BOTTOM + 4}"/></clipPath>']  # fmt: skip
    heights = ticks(low, high)
    digits = max(len(f"{at:g}".partition(".")[2]) for at in heights)
    for at in heights:
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(at):.1f}" y2="{y(at):.1f}"/>')
        drawn.append(f'<text class="right" x="{LEFT - 7}" y="{y(at) + 4:.1f}">{at:.{digits}f}</text>')
    for at in ticks(first, last, 6):
        anchor = "right" if x(at) > WIDTH - 24 else "middle"
        drawn.append(f'<text class="{anchor}" x="{min(x(at), WIDTH - 4):.1f}" y="{HEIGHT - 20}">{at:,g}</text>')
    drawn.append(f'<text class="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}">step</text>')
    lines = [_lines(name, group, number, x, y) for number, (name, group) in enumerate(named)]
    drawn.append(f'<g clip-path="url(#{clip_id})">' + "".join(band for band, _ in lines)
                 + "".join(line for _, line in lines) + "</g>")  # fmt: skip
    return (f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(description)}">'
            + "".join(drawn) + "</svg>")  # fmt: skip


def _lines(name: str, group: Curves, number: int, x, y) -> tuple[str, str]:  # type: ignore[no-untyped-def]
    """The band of a variant, and its lines. Lines are drawn on top of all bands."""
    title = f"<title>{html.escape(name)}</title>"
    path = lambda steps, values: " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(steps, values, strict=True))  # noqa: E731
    lines = "".join(f'<polyline class="part {color(number)}" points="{path(c.steps, c.mean)}">{title}</polyline>'
                    for c in group.unfinished)  # fmt: skip
    c: Curve | None = group.finished
    if c is None:
        return "", lines
    band = path(np.concatenate([c.steps, c.steps[::-1]]), np.concatenate([c.high, c.low[::-1]]))
    lines += f'<polyline class="line {color(number)}" points="{path(c.steps, c.mean)}">{title}</polyline>'
    lines += (
        f'<circle class="{color(number)}" cx="{x(c.steps[-1]):.1f}" cy="{y(c.mean[-1]):.1f}" r="3">{title}</circle>'
    )
    return f'<polygon class="band {color(number)}" points="{band}"/>', lines


def axis_limit(scores: Sequence[Score]) -> float:
    """How far from 0 the axis of the whiskers reaches: the largest end, unless one interval dwarfs the rest."""
    ends = max((abs(x) for s in scores for x in (s.value, s.low, s.high) if math.isfinite(x)), default=0.0)
    return min(ends, 4 * max((abs(s.value) for s in scores), default=0.0)) or 1.0


def whisker(score: Score, limit: float, number: int) -> str:
    """A difference as a point in its interval, with 0 in the middle; an end beyond `limit` has no cap."""
    at = lambda value: 100 + 94 * value / limit  # noqa: E731
    drawn = '<line class="zero" x1="100" x2="100" y1="0" y2="20"/>'
    if math.isfinite(score.low):
        ends = [min(max(at(x), 0), 200) for x in (score.low, score.high)]
        drawn += f'<line class="whisker {color(number)}" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="10" y2="10"/>'
        for end in ends:
            if 0 < end < 200:
                drawn += f'<line class="cap {color(number)}" x1="{end:.1f}" x2="{end:.1f}" y1="5" y2="15"/>'
    drawn += f'<circle class="{color(number)}" cx="{at(score.value):.1f}" cy="10" r="4.5"/>'
    return f'<svg class="difference" viewBox="0 0 200 20" aria-hidden="true">{drawn}</svg>'
