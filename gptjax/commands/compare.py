"""`gptjax report`, `gptjax diff` and `gptjax runs`: compare and list runs. They only read, and use no device."""

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
from gptjax.errors import GptjaxError, printable


@dataclass(frozen=True)
class Report:
    """Compare variants over seeds, from runs and sweeps: a table, report.html and report.png."""

    folders: Annotated[
        Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN|SWEEP")
    ]  # run folders and sweep folders
    metric: str = "val_loss"  # a metric of result.json, for instance val_bits_per_byte
    baseline: str | None = None  # the name or label of the variant to compare with; None: the first
    out: Path | None = None  # folder of report.html and report.png; None: the given folder, or . for several
    json: bool = False  # print one JSON object to stdout


def report(arguments: list[str]) -> None:
    """Runs and sweeps -> a table on stdout, a page and a plot."""
    options: Report = parse(Report, arguments, "report")
    if not options.folders:
        raise GptjaxError("name the runs or sweeps to compare, for instance gptjax report runs/ffn")
    if missing := [name for name in ("matplotlib", "scipy") if find_spec(name) is None]:
        raise GptjaxError(f"needs {' and '.join(missing)}; pip install 'gptjax[report]'")
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
        write_atomic(folder / "report.html", page(c, title).encode(errors="backslashreplace"))
        plot_comparison(c, folder / "report.png", title)
    except OSError as e:
        raise GptjaxError(f"{folder}: cannot be written ({e.strerror}); choose another folder with --out") from None
    if options.json:
        print(json.dumps(as_json(c) | {"page": str(folder / "report.html")}))
        return
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(printable(as_text(c)) + "".join(f"\n\n{bold}NOTE: {printable(w)}{plain}" for w in c.warnings))
    print(f"\n{folder / 'report.html'}, {folder / 'report.png'}")


@dataclass(frozen=True)
class Diff:
    """Compare two runs or experiment files: config, environment and final metrics."""

    a: Annotated[Positional[str], tyro.conf.arg(metavar="A")]  # a run folder, an experiment file, or a trial's JSON
    b: Annotated[Positional[str], tyro.conf.arg(metavar="B")]  # the other one
    json: bool = False  # print one JSON object to stdout


def diff(arguments: list[str]) -> None:
    """Two runs or files -> their differences."""
    options: Diff = parse(Diff, arguments, "diff")
    from gptjax.lab.differences import as_text, differences, load_side

    a, b = load_side(options.a), load_side(options.b)
    found = differences(a, b)
    print(json.dumps(found) if options.json else printable(as_text(a, b, found)))


@dataclass(frozen=True)
class Runs:
    """List the runs of a folder, including those of sweeps; a damaged run is a line that says why."""

    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="FOLDER")] = Path("runs")  # folder of runs
    filter: tuple[str, ...] = ()  # for instance model.ffn=swiglu 'val_loss<3'
    sort: str | None = None  # a field or metric, for instance val_loss
    reverse: bool = False  # largest first
    json: bool = False  # print a JSON list to stdout


def runs(arguments: list[str]) -> None:
    """A folder -> one line for each run."""
    options: Runs = parse(Runs, arguments, "runs")
    from gptjax.lab.listing import as_json, as_text, filter_records, sort_records
    from gptjax.lab.records import find_runs

    found = find_runs(options.folder)
    kept = filter_records(found, options.filter)
    if options.sort:
        kept = sort_records(kept, options.sort, options.reverse)
    elif options.reverse:
        raise GptjaxError("--reverse: has no effect without --sort; remove it, or add --sort FIELD")
    if options.json:
        print(json.dumps(as_json(kept)))
        return
    if kept:
        print(printable(as_text(kept)))
    if not found:
        print(f"{options.folder}: no runs yet")
    elif len(kept) < len(found):
        print(f"\n{len(kept)} of {len(found)} runs")
