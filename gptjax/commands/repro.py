"""`gptjax repro`: published results, each as one command."""

import dataclasses
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from gptjax.commands import parse, start_jax
from gptjax.errors import EXIT_FAILED

if TYPE_CHECKING:
    from gptjax.lab.repro import Outcome

WIDTHS = {"claim": 24, "published": 26, "ours": 26, "tolerance": 30, "verdict": 8, "minutes": 7}


@dataclass(frozen=True)
class Repro:
    """Reproduce published results. A claim is a file in experiments/papers/, or the name of one; none: all of them."""

    claims: Positional[tuple[str, ...]] = ()
    list: bool = False  # say what there is, what it costs and what is done, and measure nothing
    folder: Path = Path("runs/repro")  # where runs, figures, claims.json and claims.html are kept
    json: bool = False  # print one JSON object for each claim


def repro(arguments: list[str]) -> None:
    """CLAIM... -> claim | published | ours | tolerance | verdict | minutes, and a page with all that was measured."""
    options: Repro = parse(Repro, arguments, "repro")
    from gptjax.lab.repro import PAGE, all_claims, known_outcome, load_claim, reproduce

    claims = [load_claim(name) for name in options.claims] or all_claims()
    if options.list:
        for filed in claims:
            c, known = filed.claim, known_outcome(filed, options.folder)
            done = known.verdict if known else "to do"
            print(f"{filed.name:<26}{c.device:<5}{c.minutes:>6g} min  {done:<7} {c.title}")
        return
    start_jax()
    outcomes = []
    if not options.json:
        print(_line({name: name for name in WIDTHS}), flush=True)
    for outcome in reproduce(claims, options.folder):
        outcomes.append(outcome)
        print(
            json.dumps(dataclasses.asdict(outcome), ensure_ascii=False) if options.json else _row(outcome), flush=True
        )
    passed = sum(outcome.verdict == "pass" for outcome in outcomes)
    idle = sum(outcome.verdict == "not run" for outcome in outcomes)
    left_out = f", {idle} not run" if idle else ""
    print(f"{passed} of {len(outcomes)} pass{left_out}; {options.folder / PAGE}", file=sys.stderr)
    if not all(_as_it_should_be(outcomes)):
        sys.exit(EXIT_FAILED)


def _as_it_should_be(outcomes: "Sequence[Outcome]") -> list[bool]:
    """Whether each claim passes, or is one for a GPU that could not be run here."""
    return [o.verdict == "pass" or (o.verdict == "not run" and o.seen.startswith("needs a GPU")) for o in outcomes]


def _row(outcome: "Outcome") -> str:
    """A row of the table; why there is no figure stands below it, as paths and commands are not to be broken."""
    cells = {
        "claim": outcome.name,
        "published": outcome.published,
        "ours": outcome.ours or "-",
        "tolerance": outcome.tolerance,
        "verdict": outcome.verdict,
        "minutes": f"{outcome.minutes:.1f}",
    }
    return _line(cells) if outcome.ours else f"{_line(cells)}\n  {outcome.name}: {outcome.seen}"


def _line(cells: dict[str, str]) -> str:
    """One row of the table, each cell wrapped to its column."""
    columns = [textwrap.wrap(cells[name], width, break_on_hyphens=False) or [""] for name, width in WIDTHS.items()]
    depth = max(map(len, columns))
    padded = [column + [""] * (depth - len(column)) for column in columns]
    rows = zip(*padded, strict=True)
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, WIDTHS.values(), strict=True)).rstrip() for row in rows
    )
