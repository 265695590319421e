"""A comparison in words and figures: what the terminal, the page and JSON say alike."""

import math
from collections.abc import Sequence
from typing import Any

from gptjax.lab.comparison import BITS, Comparison, Row
from gptjax.lab.records import Record
from gptjax.lab.variants import seed_of
from gptjax.tuning.intervals import BOOTSTRAP, STUDENT, Score

LABELS = {
    "val_loss": "validation loss",
    BITS: "bits a byte",
    "best_val_loss": "best validation loss",
    "train_loss": "training loss",
    "val_accuracy": "validation accuracy",
    "tokens_per_second": "tokens a second",
    "memory_bytes": "peak memory (bytes)",
}


def label(metric: str) -> str:
    return LABELS.get(metric, metric.replace("_", " "))


def figure(value: float, sign: bool = False) -> str:
    """With as many digits as tell something."""
    plus = "+" if sign and value else ""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:{plus},.0f}"
    return f"{value:{plus}.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:{plus}.2g}"


def interval(score: Score, sign: bool = False) -> str:
    """From where to where; empty for a single run, which has none."""
    return "" if math.isnan(score.low) else f"{figure(score.low, sign)} to {figure(score.high, sign)}"


def seeds(row: Row) -> str:
    """How many have finished, of how many."""
    done, asked = len(row.variant.finished), len(row.variant.records)
    return str(done) if done == asked else f"{done} of {asked}"


def told(row: Row) -> str:
    """The reason of a verdict, and what would settle it."""
    return "; ".join(part for part in (row.verdict.why, row.verdict.more) if part)


def state(record: Record) -> str:
    """In a line, what has become of a run."""
    between = ", " if record.state == "missing" else ": " if record.state == "damaged" else " "
    return record.state + (between + record.why if record.why else "")


def notes(c: Comparison) -> list[str]:
    """How the figures were made, so that they can be judged."""
    scores = [s for row in c.rows for s in (row.value, row.difference) if s is not None and s.signature]
    methods = sorted({s.signature for s in scores}, reverse=True)
    better = "higher" if c.higher_is_better else "lower"
    made = [f"{label(c.metric).capitalize()} is the figure at the end of a run; {better} is better."]
    if methods:
        how = "Student's t, and from 12 seeds on by the studentized bootstrap"
        if methods == [STUDENT]:
            how = "Student's t (over so few seeds a bootstrap would be too narrow)"
        elif methods == [BOOTSTRAP]:
            how = "the studentized bootstrap"
        made.append(f"Intervals hold the true mean over seeds 95 times in 100, by {how}. A single seed has none.")
    compared = sum(row.difference is not None for row in c.rows)
    if compared:
        made.append(
            f"Differences are paired: of each seed, the variant less {c.baseline}. Better and worse mean that the "
            "interval of the mean difference leaves out 0."
        )
    if compared > 1:
        made.append(
            f"Each of the {compared} intervals is by itself: of 20 variants that make no difference, one will be "
            "called better or worse."
        )
    if any(row.verdict.more for row in c.rows):
        made.append(
            "How many more seeds is a rough guess: it takes the difference and its spread to be as they look, and asks "
            "for an interval that leaves out 0 in 4 of 5 repetitions."
        )
    return made


def as_text(c: Comparison) -> str:
    """The table for a terminal; what must not be overlooked stands below it."""
    with_bits = any(row.bits for row in c.rows)
    extra = ["bits a byte"] if with_bits else []
    lines = [["variant", "seeds", label(c.metric), "", *extra, "difference", "", "verdict"]]
    for row in c.rows:
        value, gap = row.value, row.difference
        bits = [figure(row.bits.value) if row.bits else "-"] if with_bits else []
        lines.append([
            row.variant.name, seeds(row), figure(value.value) if value else "-", interval(value) if value else "",
            *bits,
            figure(gap.value, True) if gap else "", interval(gap, True) if gap else "",
            row.verdict.word + (f" ({told(row)})" if told(row) else ""),
        ])  # fmt: skip
    text = columns(lines)
    if c.unfinished:
        text += "\n\nnot finished:\n" + "\n".join(f"  {r.name}: {state(r)}" for r in c.unfinished)
    return text


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Cells below one another, figures to the right; empty columns are left out."""
    kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines)]
    widths = {i: max(len(line[i]) for line in lines) for i in kept}
    right = {i for i in kept if all(_is_figure(line[i]) for line in lines[1:])}
    rows = ("  ".join(f"{line[i]:>{widths[i]}}" if i in right else f"{line[i]:<{widths[i]}}" for i in kept)
            for line in lines)  # fmt: skip
    return "\n".join(row.rstrip() for row in rows)


def _is_figure(cell: str) -> bool:
    return not cell or cell == "-" or (cell[-1].isdigit() and cell.lstrip("+-")[:1].isdigit())


def as_json(c: Comparison) -> dict[str, Any]:
    """All that the page says, for programs."""
    return {
        "metric": c.metric,
        "higher_is_better": c.higher_is_better,
        "baseline": c.baseline,
        "warnings": list(c.warnings),
        "notes": notes(c),
        "variants": [_row_json(row, c.metric) for row in c.rows],
        "fields": {path: list(values) for path, values in c.fields.items()},
    }


def _row_json(row: Row, metric: str) -> dict[str, Any]:
    more = row.verdict.more_seeds
    return {
        "name": row.variant.name,
        "values": {str(seed): value for seed, value in row.variant.by_seed(metric).items()},
        "mean": _score_json(row.value),
        "bits_per_byte": _score_json(row.bits),
        "difference": _score_json(row.difference),
        "pairs": row.pairs,
        "verdict": row.verdict.word,
        "why": told(row),
        "more_seeds": int(more) if math.isfinite(more) else None,
        "runs": [
            {"name": r.name, "seed": seed_of(r), "state": r.state, "why": r.why, "step": r.step}
            for r in row.variant.records
        ],
    }


def _score_json(score: Score | None) -> dict[str, Any] | None:
    if score is None:
        return None
    low, high = (None if math.isnan(x) else x for x in (score.low, score.high))
    return {"value": score.value, "low": low, "high": high, "interval": score.signature or None}
