"""A comparison as one page of HTML that needs nothing else: no network, no script, no font.

All that comes out of runs is escaped, and the page forbids itself to load anything.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from gptjax.lab.charts import color, line_chart, reach, whisker
from gptjax.lab.comparison import Comparison, Row, environments
from gptjax.lab.curves import curves
from gptjax.lab.records import Record
from gptjax.lab.text_report import figure, interval, label, notes, seeds, state, told
from gptjax.lab.variants import seed_of

MARKS = {"better": "&#9650; ", "worse": "&#9660; ", "cannot tell": "&#8776; ", "not comparable": "&#8800; "}
SAMPLE = 1500  # characters of a run's samples that are shown


def page(c: Comparison, title: str) -> str:
    """The whole page."""
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
    whole = "finished" if done == len(records) else f"of which {done} {'has' if done == 1 else 'have'} finished"
    against = f", compared with {c.baseline}" if len(c.rows) > 1 else ""
    return f"{count}{against}; {runs}, {whole}."


def _pending(c: Comparison) -> str:
    """What is not there yet, where everybody sees it."""
    named = "; ".join(f"<b>{escape(r.name)}</b> {escape(state(r))}" for r in c.unfinished[:8])
    more = f"; and {len(c.unfinished) - 8} more, listed below" if len(c.unfinished) > 8 else ""
    return f'<p class="pending">Not finished: {named}{more}.</p>' if named else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[tuple[str, str]]], kind: str = "") -> str:
    """Rows of cells, each (class, HTML); in a narrow window `rows` shows every row as a list with the headings."""
    kinds = {True: ' class="number"', False: ""}
    heads = "".join(f"<th{kinds[h.startswith('#')]}>{escape(h.lstrip('#'))}</th>" for h in head)
    lines = []
    for row in rows:
        cells = (f'<td class="{of}{"" if content else " empty"}" data-label="{escape(h.lstrip("#"))}">'
                 f"<div>{content}</div></td>" for h, (of, content) in zip(head, row, strict=True))  # fmt: skip
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return (f'<table class="{kind}">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n' + "\n".join(lines)
            + "\n</tbody>\n</table>")  # fmt: skip


def _named(c: Comparison, number: int) -> tuple[str, str]:
    return "name", f'<span class="swatch {color(number)}"></span>{escape(c.rows[number].variant.name)}'


def _ablation(c: Comparison) -> str:
    with_bits = any(row.bits for row in c.rows)
    head = ["Variant", "Seeds", label(c.metric).capitalize(), *(["Bits a byte"] if with_bits else []),
            f"Difference from {c.baseline}", "Verdict"]  # fmt: skip
    most = reach([row.difference for row in c.rows if row.difference])
    rows = []
    for number, row in enumerate(c.rows):
        bits = [("", escape(figure(row.bits.value)) if row.bits else "")] if with_bits else []
        rows.append([_named(c, number), ("", seeds(row)), ("", _value(row)), *bits,
                     ("", _difference(row, most, number)), ("told", _verdict(row))])  # fmt: skip
    if len(c.rows) == 1:
        head, rows = head[:-2], [row[:-2] for row in rows]
    return _table(head, rows, "rows")


def _value(row: Row) -> str:
    if row.value is None:
        return "&ndash;"
    span = interval(row.value)
    return f"{figure(row.value.value)}" + (f"<small>{_minus(span)}</small>" if span else "")


def _difference(row: Row, most: float, number: int) -> str:
    if row.difference is None:
        return ""
    span = interval(row.difference, True)
    paired = "1 pair" if row.pairs == 1 else f"{row.pairs} pairs"
    return (f"{_minus(figure(row.difference.value, True))}<small>{f'{_minus(span)}, ' if span else ''}{paired}</small>"
            + whisker(row.difference, most, number))  # fmt: skip


def _verdict(row: Row) -> str:
    word = row.verdict.word
    why = f"<small>{escape(told(row))}</small>" if told(row) else ""
    return f'<span class="verdict {"base" if word == "baseline" else word}">{MARKS.get(word, "")}{word}</span>{why}'


def _minus(text: str) -> str:
    return escape(text).replace("-", "&minus;")


def _losses(c: Comparison) -> str:
    figures = []
    for key, title in (("loss", "Training loss, smoothed"), ("val_loss", "Validation loss")):
        named = [(row.variant.name, curves(row.variant, key)) for row in c.rows]
        what = f"{title}, over steps, a curve for each of {', '.join(name for name, _ in named)}"
        over_time = any(len(x.steps) > 1 for _, c in named for x in (c.whole, *c.parts) if x)
        if over_time and (chart := line_chart(named, f"clip-{key}", what)):
            figures.append(f'<figure class="card"><h3>{title}</h3>{chart}</figure>')
    if not figures:
        return ""
    key = "".join(f'<li><span class="swatch {color(i)}"></span>{escape(row.variant.name)}</li>'
                  for i, row in enumerate(c.rows))  # fmt: skip
    return f'<ul class="key">{key}</ul>\n<div class="two">{"".join(figures)}</div>'


def _differences(c: Comparison) -> str:
    if not c.fields:
        return ""
    base = next(i for i, row in enumerate(c.rows) if row.verdict.word == "baseline")
    rows = []
    for path, values in c.fields.items():
        cells = [("other" if value != values[base] else "same", f"<code>{escape(_shown(value))}</code>")
                 for value in values]  # fmt: skip
        rows.append([("", f"<code>{escape(path)}</code>"), *cells])
    return f'<div class="card scroll">{_table(["Field", *(row.variant.name for row in c.rows)], rows)}</div>'


def _shown(value: object) -> str:
    text = str(value) if not isinstance(value, tuple) else ", ".join(map(str, value)) or "none"
    return text if len(text) <= 60 else text[:57] + "..."


def _speed(c: Comparison) -> str:
    rows = []
    for number, row in enumerate(c.rows):
        if row.variant.finished:
            rows.append([_named(c, number), *(("number", text) for text in speeds(row))])
    head = ["Variant", "#Parameters", "#Tokens/s", "#Milliseconds a step", "#Peak memory, GB", "#Training, s"]
    return f'<div class="card scroll">{_table(head, rows)}</div>' if rows else ""


def speeds(row: Row) -> list[str]:
    """Parameters, tokens a second, milliseconds a step, peak memory and seconds: means over the finished runs."""
    mean = lambda values: float(np.mean(found)) if (found := [v for v in values if v is not None]) else None  # noqa: E731
    figures = [r.figures for r in row.variant.finished]
    get = lambda name: mean([f.get(name) for f in figures])  # noqa: E731
    steps = [1e3 * f["tokens"] / f["steps"] / f["tokens_per_second"] if f.get("tokens_per_second") and f.get("steps")
             and "tokens" in f else None for f in figures]  # fmt: skip
    memory = get("memory_bytes")
    shown = ((get("num_params"), ",.0f"), (get("tokens_per_second"), ",.0f"), (mean(steps), ",.1f"),
             (memory and memory / 1e9, ".2f"), (get("seconds"), ",.1f"))  # fmt: skip
    return ["-" if value is None else format(value, how) for value, how in shown]


def _samples(c: Comparison) -> str:
    """Of each variant the first run that has any; the same seed for all, where it can be."""
    cards = []
    for number, row in enumerate(c.rows):
        written = next(((r, text) for r in row.variant.records if (text := r.samples())), None)
        if written:
            record, text = written
            text = text if len(text) <= SAMPLE else text[:SAMPLE] + " [...]"
            head = f'<span class="swatch {color(number)}"></span>{escape(row.variant.name)}'
            cards.append(f'<div class="card"><h3>{head} <span class="soft">seed {seed_of(record)}</span></h3>'
                         f"<pre>{escape(text)}</pre></div>")  # fmt: skip
    return f'<div class="samples">{"".join(cards)}</div>' if cards else ""


def _runs(c: Comparison) -> str:
    """Every run, finished or not."""
    head = ["Run", "#Seed", f"#{label(c.metric).capitalize()}", "State"]
    rows = [
        [("name", escape(r.name)), ("number", str(seed_of(r))), ("number", _of(r, c.metric)),
         ("wrap" if r.state == "finished" else "wrap other", escape(state(r)))]
        for row in c.rows for r in row.variant.records
    ]  # fmt: skip
    return f'<div class="card scroll">{_table(head, rows, "runs")}</div>'


def _of(record: Record, metric: str) -> str:
    if record.state == "finished" and metric in record.figures:
        return _minus(figure(record.figures[metric]))
    return "not finite" if metric in record.diverged else "&ndash;"


def _notes(c: Comparison) -> str:
    made = [
        *notes(c),
        "Curves are means over the finished seeds, bands reach from the lowest to the highest. Runs that have not "
        "finished are dotted, each by itself. What lies above a curve's first twentieth is cut off.",
        "Speed is that of the machine, with whatever else it did at the time.",
    ]
    kinds = environments(row.variant for row in c.rows)
    with_what = [f"{what}: {', '.join(sorted(of_it))}" for what, of_it in kinds.items() if of_it]
    if with_what:
        made.append(f"Made with {'; '.join(with_what)}.")
    return (
        '<ul class="notes card" style="padding-left:34px">' + "".join(f"<li>{escape(n)}</li>" for n in made) + "</ul>"
    )
