"""`gptjax repro`: reproduce published results."""

import dataclasses
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from gptjax.commands import parse, start_jax
from gptjax.errors import EXIT_FAILED

if TYPE_CHECKING:
    from gptjax.lab.repro import ClaimResult

WIDTHS = {"claim": 24, "published": 26, "ours": 26, "tolerance": 30, "verdict": 8, "minutes": 7}


@dataclass(frozen=True)
class Repro:
    """Reproduce published results. A claim is a file with a `claim`, or the name of one in experiments/papers."""

    claims: Annotated[
        Positional[tuple[str, ...]], tyro.conf.arg(metavar="CLAIM")
    ] = ()  # names or files; none: every claim in experiments/papers
    list: bool = False  # list the claims with their cost and verdict, and measure nothing
    folder: Path = Path("runs/repro")  # folder of the runs, of claims.json and of claims.html
    json: bool = False  # print one JSON object for each claim


def repro(arguments: list[str]) -> None:
    """CLAIM... -> claim | published | ours | tolerance | verdict | minutes, and a page with all measurements."""
    options: Repro = parse(Repro, arguments, "repro")
    from gptjax.lab.repro import PAGE, all_claims, load_claim, reproduce, saved_result

    claims = [load_claim(name) for name in options.claims] or all_claims()
    if options.list:
        for claim_file in claims:
            c = claim_file.claim
            saved = saved_result(claim_file, options.folder)
            verdict = saved.verdict if saved else "to do"
            print(f"{claim_file.name:<26}{c.device:<5}{c.minutes:>6g} min  {verdict:<7} {c.title}")
        return
    start_jax()
    results = []
    if not options.json:
        print(_line({name: name for name in WIDTHS}), flush=True)
    for result in reproduce(claims, options.folder):
        results.append(result)
        print(json.dumps(dataclasses.asdict(result), ensure_ascii=False) if options.json else _row(result), flush=True)
    passed = sum(result.verdict == "pass" for result in results)
    not_run = sum(result.verdict == "not run" for result in results)
    left_out = f", {not_run} not run" if not_run else ""
    print(f"{passed} of {len(results)} pass{left_out}; {options.folder / PAGE}", file=sys.stderr)
    if not all(_acceptable(results)):
        sys.exit(EXIT_FAILED)


def _acceptable(results: "Sequence[ClaimResult]") -> list[bool]:
    """Whether each claim passes, or needs a GPU that this machine does not have."""
    return [o.verdict == "pass" or (o.verdict == "not run" and o.note.startswith("needs a GPU")) for o in results]


def _row(result: "ClaimResult") -> str:
    """A row of the table. A reason for a missing result is on its own line, so that paths are not split."""
    cells = {
        "claim": result.name,
        "published": result.published,
        "ours": result.ours or "-",
        "tolerance": result.tolerance,
        "verdict": result.verdict,
        "minutes": f"{result.minutes:.1f}",
    }
    return _line(cells) if result.ours else f"{_line(cells)}\n  {result.name}: {result.note}"


def _line(cells: dict[str, str]) -> str:
    """A row of the table, with each cell wrapped to its column."""
    columns = [textwrap.wrap(cells[name], width, break_on_hyphens=False) or [""] for name, width in WIDTHS.items()]
    depth = max(map(len, columns))
    padded = [column + [""] * (depth - len(column)) for column in columns]
    rows = zip(*padded, strict=True)
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, WIDTHS.values(), strict=True)).rstrip() for row in rows
    )
