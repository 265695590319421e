"""A comparison as one self-contained HTML page: no network, no script, no font.

Everything that comes from runs is escaped, and the page's security policy forbids it to load anything.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from gptjax.lab.charts import axis_limit, color, line_chart, whisker
from gptjax.lab.comparison import Comparison, Row, environments
from gptjax.lab.curves import curves
from gptjax.lab.records import RunRecord
from gptjax.lab.text_report import (
    describe_state,
    explanation,
    format_interval,
    format_number,
    header,
    loss_unit,
    notes,
    seed_count,
)
from gptjax.lab.variants import seed_of

MARKS = {"better": "&#9650; ", "worse": "&#9660; ", "cannot tell": "&#8776; ", "not comparable": "&#8800; "}
SAMPLE = 1500  # characters shown of a run's samples


def page(c: Comparison, title: str) -> str:
    """The HTML of the page."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_lead(c))}</p>',
        *(f'<p class="warning">{escape(w)}</p>' for w in c.warnings),
        _pending(c),
        _section("Comparison", f'<div class="card">{_ablation(c)}</div>'),
        _section("Loss", _losses(c)),
        _section("What differs", _differences(c)),
        _section("Speed and size", _speed(c)),
        _section("Samples", _samples(c)),
        _section("Runs", _runs(c)),
        _section("How to read this", _notes(c)),
    ]
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>" if content else ""


def _lead(c: Comparison) -> str:
    records = [r for row in c.rows for r in row.variant.records]
    done = sum(r.state == "finished" for r in records)
    count = "1 variant" if len(c.rows) == 1 else f"{len(c.rows)} variants"
    runs = "1 run" if len(records) == 1 else f"{len(records)} runs"
    finished = "finished" if done == len(records) else f"{done} of them finished"
    baseline = f", compared with {c.baseline}" if len(c.rows) > 1 else ""
    return f"{count}{baseline}; {runs}, {finished}."


def _pending(c: Comparison) -> str:
    """The unfinished runs, at the top of the page."""
    named = "; ".join(f"<b>{escape(r.name)}</b> {escape(describe_state(r))}" for r in c.unfinished[:8])
    more = f"; and {len(c.unfinished) - 8} more, listed below" if len(c.unfinished) > 8 else ""
    return f'<p class="pending">Not finished: {named}{more}.</p>' if named else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[tuple[str, str]]], kind: str = "") -> str:
    """Rows of cells, each (class, HTML). With `kind` 'rows' a narrow window shows each row as a list with headings."""
    kinds = {True: ' class="number"', False: ""}
    heads = "".join(f"<th{kinds[h.startswith('#')]}>{escape(h.lstrip('#'))}</th>" for h in head)
    lines = []
    for row in rows:
        cells = (f'<td class="{css}{"" if content else " empty"}" data-label="{escape(h.lstrip("#"))}">'
                 f"<div>{content}</div></td>" for h, (css, content) in zip(head, row, strict=True))  # fmt: skip
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return (f'<table class="{kind}">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n' + "\n".join(lines)
            + "\n</tbody>\n</table>")  # fmt: skip


def _named(c: Comparison, number: int) -> tuple[str, str]:
    return "name", f'<span class="swatch {color(number)}"></span>{escape(c.rows[number].variant.label)}'


def _ablation(c: Comparison) -> str:
    with_bits = any(row.bits for row in c.rows)
    head = ["Variant", "Seeds", header(c).capitalize(), *(["Bits/byte"] if with_bits else []),
            f"Difference from {c.baseline}", "Verdict"]  # fmt: skip
    limit = axis_limit([row.difference for row in c.rows if row.difference])
    rows = []
    for number, row in enumerate(c.rows):
        bits = [("", escape(format_number(row.bits.value)) if row.bits else "")] if with_bits else []
        rows.append([_named(c, number), ("", seed_count(row)), ("", _value(row)), *bits,
                     ("", _difference(row, limit, number)), ("reason", _verdict(row))])  # fmt: skip
    if len(c.rows) == 1:
        head, rows = head[:-2], [row[:-2] for row in rows]
    return _table(head, rows, "rows")


def _value(row: Row) -> str:
    if row.value is None:
        return "&ndash;"
    span = format_interval(row.value)
    return format_number(row.value.value) + (f"<small>{_minus(span)}</small>" if span else "")


def _difference(row: Row, limit: float, number: int) -> str:
    if row.difference is None:
        return ""
    span = format_interval(row.difference, True)
    paired = "1 pair" if row.pairs == 1 else f"{row.pairs} pairs"
    value = _minus(format_number(row.difference.value, True))
    details = f"{_minus(span)}, {paired}" if span else paired
    return f"{value}<small>{details}</small>" + whisker(row.difference, limit, number)


def _verdict(row: Row) -> str:
    outcome = row.verdict.outcome
    css = "base" if outcome == "baseline" else outcome
    why = f"<small>{escape(explanation(row))}</small>" if explanation(row) else ""
    return f'<span class="verdict {css}">{MARKS.get(outcome, "")}{outcome}</span>{why}'


def _minus(text: str) -> str:
    return escape(text).replace("-", "&minus;")


def _losses(c: Comparison) -> str:
    panels = []
    unit = f" ({loss_unit(c)})" if loss_unit(c) else ""
    for key, title in (("loss", "Training loss, smoothed"), ("val_loss", "Validation loss")):
        named = [(row.variant.label, curves(row.variant, key)) for row in c.rows]
        description = f"{title} over steps, one curve each for {', '.join(name for name, _ in named)}"
        if any(len(x.steps) > 1 for _, group in named for x in (group.finished, *group.unfinished) if x):
            chart = line_chart(named, f"clip-{key}", description)
            panels.append(f'<figure class="card"><h3>{title}{unit}</h3>{chart}</figure>')
    if not panels:
        return ""
    key = "".join(f'<li><span class="swatch {color(i)}"></span>{escape(row.variant.label)}</li>'
                  for i, row in enumerate(c.rows))  # fmt: skip
    return f'<ul class="key">{key}</ul>\n<div class="two">{"".join(panels)}</div>'


def _differences(c: Comparison) -> str:
    if not c.fields:
        return ""
    base = next(i for i, row in enumerate(c.rows) if row.verdict.outcome == "baseline")
    rows = []
    for path, values in c.fields.items():
        cells = [("other" if value != values[base] else "same", f"<code>{escape(_text(value))}</code>")
                 for value in values]  # fmt: skip
        rows.append([("", f"<code>{escape(path)}</code>"), *cells])
    return f'<div class="card scroll">{_table(["Field", *(row.variant.label for row in c.rows)], rows)}</div>'


def _text(value: object) -> str:
    text = str(value) if not isinstance(value, tuple) else ", ".join(map(str, value)) or "none"
    return text if len(text) <= 60 else text[:57] + "..."


def _speed(c: Comparison) -> str:
    rows = []
    for number, row in enumerate(c.rows):
        if row.variant.finished:
            rows.append([_named(c, number), *(("number", text) for text in speeds(row))])
    head = ["Variant", "#Parameters", "#Tokens/s", "#ms/step", "#Peak memory (GB)", "#Training time (s)"]
    return f'<div class="card scroll">{_table(head, rows)}</div>' if rows else ""


def speeds(row: Row) -> list[str]:
    """Parameters, tokens/s, ms/step, peak memory in GB and seconds: means over the finished runs."""
    mean = lambda values: float(np.mean(found)) if (found := [v for v in values if v is not None]) else None  # noqa: E731
    metrics = [r.final_metrics for r in row.variant.finished]
    get = lambda name: mean([m.get(name) for m in metrics])  # noqa: E731
    steps = [1e3 * m["tokens"] / m["steps"] / m["tokens_per_second"] if m.get("tokens_per_second") and m.get("steps")
             and "tokens" in m else None for m in metrics]  # fmt: skip
    memory = get("memory_bytes")
    columns = ((get("num_params"), ",.0f"), (get("tokens_per_second"), ",.0f"), (mean(steps), ",.1f"),
               (memory and memory / 1e9, ".2f"), (get("seconds"), ",.1f"))  # fmt: skip
    return ["-" if value is None else format(value, spec) for value, spec in columns]


def _samples(c: Comparison) -> str:
    """The samples of each variant's first run that has any; usually the same seed for all."""
    cards = []
    for number, row in enumerate(c.rows):
        written = next(((r, text) for r in row.variant.records if (text := r.samples())), None)
        if written:
            record, text = written
            text = text if len(text) <= SAMPLE else text[:SAMPLE] + " [...]"
            head = f'<span class="swatch {color(number)}"></span>{escape(row.variant.label)}'
            cards.append(f'<div class="card"><h3>{head} <span class="soft">seed {seed_of(record)}</span></h3>'
                         f"<pre>{escape(text)}</pre></div>")  # fmt: skip
    return f'<div class="samples">{"".join(cards)}</div>' if cards else ""


def _runs(c: Comparison) -> str:
    """Every run, finished or not."""
    head = ["Run", "#Seed", f"#{header(c).capitalize()}", "State"]
    rows = [
        [("name", escape(r.name)), ("number", str(seed_of(r))), ("number", _metric_cell(r, c.metric)),
         ("wrap" if r.state == "finished" else "wrap other", escape(describe_state(r)))]
        for row in c.rows for r in row.variant.records
    ]  # fmt: skip
    return f'<div class="card scroll">{_table(head, rows, "runs")}</div>'


def _metric_cell(record: RunRecord, metric: str) -> str:
    if record.state == "finished" and metric in record.final_metrics:
        return _minus(format_number(record.final_metrics[metric]))
    return "not finite" if metric in record.diverged else "&ndash;"


def _notes(c: Comparison) -> str:
    lines = [
        *notes(c),
        "Curves are means over the finished seeds; bands reach from the lowest to the highest seed. Each unfinished "
        "run is a dotted curve. The highest losses, from the first 5% of the steps, are cut off.",
        "The speed also depends on what else ran on the machine at the time.",
    ]
    found = environments(row.variant for row in c.rows)
    used = [f"{kind}: {', '.join(sorted(values))}" for kind, values in found.items() if values]
    if used:
        lines.append(f"Environment: {'; '.join(used)}.")
    return (
        '<ul class="notes card" style="padding-left:34px">' + "".join(f"<li>{escape(n)}</li>" for n in lines) + "</ul>"
    )
