"""A comparison as text and JSON: the labels, number formats and notes shared by the terminal and the page."""

import math
from collections.abc import Sequence
from typing import Any

from gptjax.lab.comparison import BITS, Comparison, Row
from gptjax.lab.records import RunRecord
from gptjax.lab.variants import seed_of
from gptjax.objectives import OBJECTIVES
from gptjax.tuning.intervals import BOOTSTRAP, STUDENT, Score

LABELS = {
    "val_loss": "validation loss",
    BITS: "bits/byte",
    "best_val_loss": "best validation loss",
    "train_loss": "training loss",
    "val_accuracy": "validation accuracy",
    "tokens_per_second": "tokens/s",
    "memory_bytes": "peak memory (bytes)",
}


def label(metric: str) -> str:
    return LABELS.get(metric, metric.replace("_", " "))


def header(c: Comparison) -> str:
    """The label of the compared metric, with its unit if it is a loss."""
    unit = loss_unit(c) if c.metric.endswith("loss") else ""
    return f"{label(c.metric)} ({unit})" if unit else label(c.metric)


def loss_unit(c: Comparison) -> str:
    """nats/token or nats/label; empty if the variants have losses of other or different kinds."""
    units = set()
    for row in c.rows:
        e = row.variant.experiment
        if e is None:
            continue
        kind = OBJECTIVES.get(e.objective.name)  # an own objective is not imported for a report
        if e.model.num_classes:
            units.add("nats/label")
        elif kind is not None and kind(e).is_token_nll():
            units.add("nats/token")
        else:
            units.add("")
    return units.pop() if len(units) == 1 else ""


def format_number(value: float, sign: bool = False) -> str:
    """A number with four decimals; large and small ones with fewer digits."""
    plus = "+" if sign and value else ""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:{plus},.0f}"
    return f"{value:{plus}.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:{plus}.2g}"


def format_interval(score: Score, sign: bool = False) -> str:
    """The interval of a score; empty for a single run, which has none."""
    if math.isnan(score.low):
        return ""
    return f"{format_number(score.low, sign)} to {format_number(score.high, sign)}"


def seed_count(row: Row) -> str:
    """The number of finished runs, and of all if some are not finished."""
    done = len(row.variant.finished)
    total = len(row.variant.records)
    return str(done) if done == total else f"{done} of {total}"


def explanation(row: Row) -> str:
    """The reason for a verdict, and how many more seeds would decide it."""
    return "; ".join(part for part in (row.verdict.why, row.verdict.seeds_hint) if part)


def describe_state(record: RunRecord) -> str:
    """The state of a run and its reason, in one line."""
    separator = ", " if record.state == "missing" else ": " if record.state == "damaged" else " "
    return record.state + (separator + record.why if record.why else "")


def notes(c: Comparison) -> list[str]:
    """How the numbers were computed and how to read them."""
    scores = [s for row in c.rows for s in (row.value, row.difference) if s is not None and s.signature]
    methods = sorted({s.signature for s in scores}, reverse=True)
    better = "higher" if c.higher_is_better else "lower"
    lines = [f"{label(c.metric).capitalize()} is measured at the end of a run; {better} is better."]
    if methods:
        method = "Student's t below 12 seeds, and the studentized bootstrap from 12 seeds on"
        if methods == [STUDENT]:
            method = "Student's t (a bootstrap over so few seeds would be too narrow)"
        elif methods == [BOOTSTRAP]:
            method = "the studentized bootstrap"
        lines.append(f"Intervals are 95% confidence intervals of the mean over seeds, by {method}. One seed has none.")
    compared = sum(row.difference is not None for row in c.rows)
    if compared:
        lines.append(
            f"Differences are paired by seed: the variant minus {c.baseline}. Better or worse means that the interval "
            "of the mean difference excludes 0."
        )
    if compared > 1:
        lines.append(
            f"The {compared} intervals are not corrected for multiple comparisons: of 20 variants without any effect, "
            "about one is called better or worse."
        )
    if any(row.verdict.seeds_hint for row in c.rows):
        lines.append(
            "The number of further seeds is a rough estimate: it assumes the observed difference and spread, and a "
            "power of 80%."
        )
    return lines


def as_text(c: Comparison) -> str:
    """The table for a terminal; unfinished runs are listed below it."""
    with_bits = any(row.bits for row in c.rows)
    extra = ["bits/byte"] if with_bits else []
    table = [["variant", "seeds", header(c), "", *extra, "difference", "", "verdict"]]
    for row in c.rows:
        value = row.value
        gap = row.difference
        why = explanation(row)
        table.append([
            row.variant.label, seed_count(row),
            format_number(value.value) if value else "-", format_interval(value) if value else "",
            *([format_number(row.bits.value) if row.bits else "-"] if with_bits else []),
            format_number(gap.value, True) if gap else "", format_interval(gap, True) if gap else "",
            row.verdict.outcome + (f" ({why})" if why else ""),
        ])  # fmt: skip
    text = columns(table)
    if c.unfinished:
        text += "\n\nnot finished:\n" + "\n".join(f"  {r.name}: {describe_state(r)}" for r in c.unfinished)
    return text


def columns(lines: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns, numbers to the right; empty columns are left out."""
    kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines)]
    widths = {i: max(len(line[i]) for line in lines) for i in kept}
    right = {i for i in kept if all(_is_number(line[i]) for line in lines[1:])}
    rows = ("  ".join(f"{line[i]:>{widths[i]}}" if i in right else f"{line[i]:<{widths[i]}}" for i in kept)
            for line in lines)  # fmt: skip
    return "\n".join(row.rstrip() for row in rows)


def _is_number(cell: str) -> bool:
    return not cell or cell == "-" or (cell[-1].isdigit() and cell.lstrip("+-")[:1].isdigit())


def as_json(c: Comparison) -> dict[str, Any]:
    """The content of the page as JSON."""
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
        "label": row.variant.label,
        "values": {str(seed): value for seed, value in row.variant.by_seed(metric).items()},
        "mean": _score_json(row.value),
        "bits_per_byte": _score_json(row.bits),
        "difference": _score_json(row.difference),
        "pairs": row.pairs,
        "verdict": row.verdict.outcome,
        "why": explanation(row),
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
