"""`gptjax report`, `gptjax diff` and `gptjax runs`: many runs looked at together. They read only; no device is used."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from gptjax.atomic_io import write_atomic
from gptjax.commands import parse
from gptjax.errors import GptjaxError


@dataclass(frozen=True)
class Report:
    """Compare the variants in runs and sweeps over their seeds: a table, report.html and report.png."""

    folders: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN|SWEEP")]  # runs and sweeps
    metric: str = "val_loss"  # a figure of result.json, for instance val_bits_per_byte
    baseline: str | None = None  # the variant that others are compared with; None: the first
    out: Path | None = None  # where report.html and report.png go; None: the folder, or for several, here
    json: bool = False  # print one JSON object on stdout


def report(arguments: list[str]) -> None:
    """Runs and sweeps -> a table on stdout, a page and a picture."""
    options: Report = parse(Report, arguments, "report")
    if not options.folders:
        raise GptjaxError("report: name the runs or sweeps to compare; gptjax report runs/ffn for instance")
    if missing := [name for name in ("matplotlib", "scipy") if find_spec(name) is None]:
        raise GptjaxError(f"report: needs {' and '.join(missing)}; pip install 'gptjax[report]'")
    from gptjax.lab.comparison import compare
    from gptjax.lab.page import page
    from gptjax.lab.report import plot_comparison
    from gptjax.lab.text_report import as_json, as_text
    from gptjax.lab.variants import variants_of

    variants, left_out = variants_of(options.folders)
    c = compare(variants, options.metric, options.baseline)
    c = dataclasses.replace(c, warnings=(*left_out, *c.warnings))
    title = ", ".join(path.resolve().name for path in options.folders[:3]) + (", ..." * (len(options.folders) > 3))
    folder = options.out or (options.folders[0] if len(options.folders) == 1 else Path())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "report.html", page(c, title))
        plot_comparison(c, folder / "report.png", title)
    except OSError as e:
        raise GptjaxError(f"{folder}: cannot be written ({e.strerror}); choose another folder by --out") from None
    if options.json:
        print(json.dumps(as_json(c) | {"page": str(folder / "report.html")}))
        return
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(as_text(c) + "".join(f"\n\n{bold}NOTE: {w}{plain}" for w in c.warnings))
    print(f"\n{folder / 'report.html'}, {folder / 'report.png'}")


@dataclass(frozen=True)
class Diff:
    """How two runs, or the experiments of two files, differ: config, environment and final figures."""

    a: Positional[str]  # a run folder, an experiment file, or a trial's JSON
    b: Positional[str]  # what to compare it with
    json: bool = False  # print one JSON object on stdout


def diff(arguments: list[str]) -> None:
    """Two runs or files -> their differences."""
    options: Diff = parse(Diff, arguments, "diff")
    from gptjax.lab.differences import as_text, differences, side

    a, b = side(options.a), side(options.b)
    found = differences(a, b)
    print(json.dumps(found) if options.json else as_text(a, b, found))


@dataclass(frozen=True)
class Runs:
    """List the runs of a folder, those of sweeps in it as well; what cannot be read is told of in its line."""

    folder: Positional[Path] = Path("runs")  # where to look
    filter: tuple[str, ...] = ()  # model.ffn=swiglu, val_loss<3 and the like; several may follow
    sort: str | None = None  # a field or figure, for instance val_loss
    reverse: bool = False  # the largest first
    json: bool = False  # print a JSON list on stdout


def runs(arguments: list[str]) -> None:
    """A folder -> one line for each run."""
    options: Runs = parse(Runs, arguments, "runs")
    from gptjax.lab.listing import as_json, as_text, keep, ordered
    from gptjax.lab.records import find

    there = find(options.folder)
    kept = keep(there, options.filter)
    if options.sort:
        kept = ordered(kept, options.sort, options.reverse)
    elif options.reverse:
        raise GptjaxError("--reverse: has no effect without --sort; leave it out, or sort by a field")
    if options.json:
        print(json.dumps(as_json(kept)))
        return
    if kept:
        print(as_text(kept))
    if not there:
        print(f"{options.folder}: no runs yet")
    elif len(kept) < len(there):
        print(f"\n{len(kept)} of {len(there)} runs")
