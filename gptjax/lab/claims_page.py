"""The table of claims as one HTML page without network access; light and dark, for screens and phones."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

COLUMNS = ("claim", "published", "ours", "tolerance", "verdict", "minutes")
STYLE = """
:root { color-scheme: light dark; --ink: #1c2530; --soft: #5b6673; --line: #dfe3e8; --paper: #ffffff; --card: #f6f8fa;
  --pass: #1e7a44; --fail: #b3372b; --crashed: #b3372b; --not-run: #6b7480; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --soft: #9aa6b2; --line: #303841; --paper: #14181d;
  --card: #1b2127; --pass: #5cc98a; --fail: #f08a7d; --crashed: #f08a7d; --not-run: #9aa6b2; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 76rem; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p { margin: .35rem 0; max-width: 60rem; } .soft { color: var(--soft); }
.wide { overflow-x: auto; margin-top: 1.25rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .5rem .75rem .5rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: .85rem; } td.number { text-align: right; white-space: nowrap; }
a { color: inherit; } .verdict { font-weight: 650; white-space: nowrap; }
.pass { color: var(--pass); } .fail { color: var(--fail); } .crashed { color: var(--crashed); }
.not-run { color: var(--not-run); }
details { background: var(--card); border-radius: .4rem; padding: .5rem .8rem; margin-top: .6rem; }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: .6rem 0 .2rem;
  font-size: .9rem; } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
@media (max-width: 42rem) {
  thead { display: none; } tr { display: block; border-bottom: 1px solid var(--line); padding: .6rem 0; }
  td { display: grid; grid-template-columns: 6.5rem 1fr; border: 0; padding: .1rem 0; }
  td.number { text-align: left; } td::before { content: attr(data-label); color: var(--soft); font-size: .85rem; }
  dl { grid-template-columns: 1fr; } dt { color: var(--soft); } }
"""


def page(claims: Sequence[Mapping[str, Any]]) -> str:
    """The page of some results, in the JSON form of `lab/repro.py`."""
    passed = sum(claim["verdict"] == "pass" for claim in claims)
    measured = sum(claim["verdict"] in ("pass", "fail") for claim in claims)
    minutes = sum(claim["minutes"] for claim in claims)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Published results, reproduced</title><style>{STYLE}</style></head><body>
<h1>Published results, reproduced</h1>
<p class="soft">{passed} of {measured} measured claims pass; {len(claims) - measured} not measured;
{minutes:.0f} minutes in total. Each claim passes or fails by the rule in its row.</p>
<div class="wide"><table><thead><tr>{"".join(f"<th>{name}</th>" for name in COLUMNS)}</tr></thead>
<tbody>{"".join(map(_row, claims))}</tbody></table></div>
{"".join(map(_section, claims))}
</body></html>
"""


def _row(claim: Mapping[str, Any]) -> str:
    name, verdict = escape(claim["name"]), claim["verdict"]
    cells = {
        "claim": f'<a href="#{name}">{name}</a>',
        "published": escape(claim["published"]),
        "ours": escape(claim["ours"] or "none"),
        "tolerance": escape(claim["tolerance"]),
        "verdict": f'<span class="verdict {_class(verdict)}">{escape(verdict)}</span>',
        "minutes": f"{claim['minutes']:.1f}",
    }
    kind = {"minutes": ' class="number"'}
    return "<tr>" + "".join(f'<td data-label="{c}"{kind.get(c, "")}>{x}</td>' for c, x in cells.items()) + "</tr>"


def _section(claim: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(_format(v))}</dd>" for k, v in claim["metrics"].items())
    details = note = ""
    if items:
        details = f"<details><summary>metrics, {escape(claim['date'])}</summary><dl>{items}</dl></details>"
    if claim["note"]:
        note = f"<p>{escape(claim['note'])}</p>"
    return (
        f'<h2 id="{escape(claim["name"])}">{escape(claim["title"])} '
        f'<span class="verdict {_class(claim["verdict"])}">{escape(claim["verdict"])}</span></h2>'
        f'<p class="soft">{escape(claim["citation"])}</p>{note}{details}'
    )


def _class(verdict: str) -> str:
    return verdict.replace(" ", "-")


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return ", ".join(map(_format, value))
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_format(v)}" for k, v in value.items())
    return str(value)
