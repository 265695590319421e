"""`gptjax eval`: how well a model does on its own validation text, on any other text, or on the tasks of lm-eval."""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from gptjax.errors import DataError, GptjaxError
from gptjax.verbs import parse, start_jax

if TYPE_CHECKING:
    from gptjax.inference.pretrained import Pretrained

MODEL = "a run folder, a Hugging Face folder, or the name of a model on the Hugging Face hub"


@dataclass(frozen=True)
class Text:
    """What goes with --data."""

    column: str = "text"  # the column that holds the text, in jsonl, csv, parquet and hub data
    hub_config: str | None = None  # configuration of a hub data set
    hub_split: str = "test"  # split of a hub data set
    max_documents: int | None = None  # read no more documents of each source than this
    stride: int | None = None  # tokens by which a window moves on; None: windows do not overlap
    context: int | None = None  # tokens of a window; None: the model's context
    by_position: bool = False  # also print the loss by the number of tokens seen
    plot: Path | None = None  # a PNG to draw that into


@dataclass(frozen=True)
class Tasks:
    """What goes with --tasks."""

    include_path: Path | None = None  # a folder with YAML files of your own tasks
    limit: float | None = None  # examples of each task; below 1: a share of them
    num_fewshot: int | None = None  # examples shown before each question; None: as the task has it


@dataclass(frozen=True)
class Evaluation:
    """Loss of a run over its validation text, of any model over other text (--data), or lm-eval's tasks (--tasks)."""

    model: Annotated[Positional[str], tyro.conf.arg(help=MODEL)]
    data: tuple[str, ...] = ()  # files, folders (txt md jsonl csv parquet), pydoc or hub:NAME; several may follow
    text: Annotated[Text, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Text)
    tasks: tuple[str, ...] = ()  # tasks of the lm-evaluation-harness, or YAML files; several may follow
    harness: Annotated[Tasks, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Tasks)
    batch_size: int = 8  # windows or requests computed at once, with --data and --tasks
    dtype: Literal["float32", "bfloat16", "int8"] | None = None  # None: the model's own; int8: 8-bit weights
    json: bool = False  # print one JSON object on stdout
    checkpoint: str = "last"  # of a run: last, best, or a step


def evaluate(arguments: list[str]) -> None:
    """MODEL -> figures on stdout."""
    options: Evaluation = parse(Evaluation, arguments, "eval")
    _check_belongs(options)
    start = {"tasks": _on_tasks, "data": _on_data}
    kind = "tasks" if options.tasks else "data" if options.data else None
    figures, shown = start[kind](options) if kind else _on_its_own_text(options)
    print(json.dumps(figures) if options.json else shown)


def _check_belongs(options: Evaluation) -> None:
    """Raises where an option would have no effect."""
    if options.data and options.tasks:
        raise GptjaxError("--data and --tasks: give one of them; they are evaluated in different ways")
    names = [f.name for f in dataclasses.fields(options.text)] if not options.data else []
    names += [f.name for f in dataclasses.fields(options.harness)] if not options.tasks else []
    names += ["batch_size", "dtype"] if not (options.data or options.tasks) else []
    values = vars(options) | vars(options.text) | vars(options.harness)
    plain = {f.name: f.default for part in (Evaluation, Text, Tasks) for f in dataclasses.fields(part)}
    if idle := [f"--{name.replace('_', '-')}" for name in names if values[name] != plain[name]]:
        homes = {
            f.name: home for part, home in ((Text, "--data"), (Tasks, "--tasks")) for f in dataclasses.fields(part)
        }
        home = homes.get(idle[0][2:].replace("-", "_"), "--data or --tasks")
        raise GptjaxError(f"{', '.join(idle)}: have no effect here; {idle[0]} goes with {home}")


def _on_its_own_text(options: Evaluation) -> tuple[Any, str]:
    from gptjax.training.run import EXPERIMENT, open_run

    folder = Path(options.model)
    if not (folder / EXPERIMENT).exists() and ((folder / "config.json").exists() or _may_be_hub_name(options.model)):
        raise DataError(
            f"{options.model}: is no run folder, so it has no validation text of its own; say what to evaluate on by "
            "--data FILE or --tasks TASK"
        )
    run = open_run(folder)
    start_jax()
    from gptjax.training.evaluation import evaluate_run

    figures = evaluate_run(run, options.checkpoint)
    return figures, _lines(figures)


def _may_be_hub_name(model: str) -> bool:
    return not Path(model).exists() and not model.startswith((".", "/", "~")) and model.count("/") <= 1


def _on_data(options: Evaluation) -> tuple[Any, str]:
    from gptjax.config import Data
    from gptjax.data import corpus
    from gptjax.inference.scoring import Scorer, evaluate_texts
    from gptjax.lab.report import check_can_plot, plot_by_position

    asked = options.text
    for source in options.data:  # before a large model is loaded
        if source != "pydoc" and not source.startswith("hub:"):
            corpus.files(source)
    if asked.plot is not None:
        check_can_plot(asked.plot)
    pretrained = _open(options)
    scorer = Scorer(pretrained, options.batch_size, options.dtype)
    window, stride = scorer.window(asked.context, asked.stride)
    data = Data(
        column=asked.column,
        hub_config=asked.hub_config,
        hub_split=asked.hub_split,
        max_documents=asked.max_documents,
    )
    documents = (text for source in options.data for text in corpus.read(source, data))
    began = time.perf_counter()
    totals = evaluate_texts(scorer, documents, stride, window)
    seconds = time.perf_counter() - began
    figures = totals.figures() | {"seconds": seconds, "context": window, "stride": stride}
    shown = _lines(figures)
    if asked.plot is not None:
        plot_by_position(totals.by_position(), asked.plot, pretrained.name)
    if asked.by_position:
        bins = totals.by_position()
        figures["by_position"] = bins
        shown += "\n\ntokens seen        loss     error       tokens\n"
        shown += "\n".join(
            f"{_span(b):>11}  {b['loss']:>10.4f}  {'-' if b['error'] is None else format(b['error'], '.4f'):>8}  "
            f"{b['tokens']:>11,}"
            for b in bins
        )
    return figures, shown


def _on_tasks(options: Evaluation) -> tuple[Any, str]:
    try:
        with redirect_stdout(sys.stderr):  # what a task prints is no figure
            from gptjax.interop import harness
    except ModuleNotFoundError as e:
        raise GptjaxError(
            f"--tasks: needs the lm-evaluation-harness, which is not installed ({e}); pip install 'gptjax[harness]'"
        ) from None
    own = options.harness
    with redirect_stdout(sys.stderr):
        lm = harness.GptjaxLM(_open(options), options.batch_size, options.dtype)
        names = [name for group in options.tasks for name in group.split(",") if name]
        results = harness.run_tasks(lm, names, own.include_path, own.limit, own.num_fewshot)
    return results, harness.table(results)


def _open(options: Evaluation) -> "Pretrained":
    start_jax()
    from gptjax.interop.open import open_model

    return open_model(options.model, options.checkpoint)


def _span(place: Mapping[str, Any]) -> str:
    return str(place["to"]) if place["from"] == place["to"] else f"{place['from']}-{place['to']}"


def _lines(figures: Mapping[str, Any]) -> str:
    width = max(map(len, figures))
    return "\n".join(
        f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value:.4f}"
        for name, value in figures.items()
    )
