"""`gptjax eval`: how well a model does on its own validation text, any other text, a task, or the tasks of lm-eval."""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from gptjax.atomic_io import read_json, write_atomic
from gptjax.commands import check_unused, is_run, parse, start_jax, without_run
from gptjax.errors import DataError, GptjaxError, warn

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
    num_fewshot: int | None = None  # examples shown before each question; None: as the task has it


@dataclass(frozen=True)
class Answers:
    """What goes with --task."""

    split: Literal["test", "validation"] = "test"  # of the task's examples
    out: Path | None = None  # folder for predictions and scores; None: the run folder, where the model is a run
    temperature: float = 0.0  # at which answers are drawn; 0: the likeliest token each time
    against: str | None = None  # a model to compare with, in the place of a trivial answer


@dataclass(frozen=True)
class Evaluation:
    """Loss of a run over its validation text, of any model over other text (--data); a task (--task), or lm-eval's."""

    model: Annotated[Positional[str], tyro.conf.arg(help=MODEL)]
    data: tuple[str, ...] = ()  # files, folders (txt md jsonl csv parquet), pydoc or hub:NAME; several may follow
    text: Annotated[Text, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Text)
    task: str | None = None  # one of gptjax's own tasks, for instance sentiment
    answers: Annotated[Answers, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Answers)
    tasks: tuple[str, ...] = ()  # tasks of the lm-evaluation-harness, or YAML files; several may follow
    harness: Annotated[Tasks, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Tasks)
    limit: float | None = None  # examples of a task; below 1: a share of them
    batch_size: int = 8  # windows or requests computed at once, with --data, --task and --tasks
    dtype: Literal["float32", "bfloat16", "int8"] | None = None  # None: the model's own; int8: 8-bit weights
    json: bool = False  # print one JSON object on stdout
    checkpoint: str = "last"  # of a run: last, best, or a step


def evaluate(arguments: list[str]) -> None:
    """MODEL -> figures on stdout."""
    options: Evaluation = parse(Evaluation, arguments, "eval")
    _check_belongs(options)
    on = _on_data if options.data else _on_task if options.task else _on_tasks if options.tasks else _on_its_own_text
    figures, shown = on(options)
    print(json.dumps(figures) if options.json else shown)


def _check_belongs(options: Evaluation) -> None:
    """Raises `GptjaxError` where an option would have no effect."""
    from gptjax.data.corpus import TEXT

    given = [flag for flag in ("data", "task", "tasks") if getattr(options, flag)]
    if len(given) > 1:
        flags = " and ".join(f"--{flag}" for flag in given)
        raise GptjaxError(f"{flags}: give one of them; they are evaluated in different ways")
    idle = without_run(options.model)
    if not options.task:
        idle["no effect without --task"] = [f.name for f in dataclasses.fields(Answers)]
    if not options.tasks:
        idle["no effect without --tasks"] = [f.name for f in dataclasses.fields(Tasks)]
    if not options.data:
        idle["no effect without --data"] = [f.name for f in dataclasses.fields(Text)]
    if not (options.task or options.tasks):
        idle["no effect without --task or --tasks"] = ["limit"]
    if not given:
        idle["no effect without --data, --task or --tasks"] = ["batch_size", "dtype"]
    if options.data and not any(source.startswith("hub:") for source in options.data):
        idle["no effect without --data hub:NAME"] = ["hub_config", "hub_split"]
    if options.data and all(source == "pydoc" or source.endswith(TEXT) for source in options.data):
        idle["no effect on plain text, which has no columns"] = ["column"]
    check_unused(options, idle)


def _on_its_own_text(options: Evaluation) -> tuple[Any, str]:
    from gptjax.training.run import open_run

    folder, why = Path(options.model), None
    if is_run(options.model):
        why = "holds imported weights" if "imported" in open_run(folder).provenance() else None
    elif (folder / "config.json").exists() or _may_be_hub_name(options.model):
        why = "is no run folder"
    if why:
        raise DataError(
            f"{options.model}: {why}, so it has no validation text of its own; say what to evaluate on by "
            "--data FILE, --task TASK or --tasks TASK"
        )
    run = open_run(folder)
    start_jax()
    from gptjax.interop.open import open_local
    from gptjax.training.evaluation import evaluate_run

    figures = evaluate_run(run, options.checkpoint, open_local)
    return figures, _lines(figures)


def _may_be_hub_name(model: str) -> bool:
    return not Path(model).exists() and not model.startswith((".", "/", "~")) and model.count("/") <= 1


def _on_data(options: Evaluation) -> tuple[Any, str]:
    from gptjax.config import DataConfig
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
    data = DataConfig(
        column=asked.column,
        hub_config=asked.hub_config,
        hub_split=asked.hub_split,
        max_documents=asked.max_documents,
    )
    documents = (text for source in options.data for text in corpus.iter_documents(source, data))
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


def _on_task(options: Evaluation) -> tuple[Any, str]:
    from gptjax.data.tasks import find_task

    assert options.task
    task = find_task(options.task)
    try:
        from gptjax.tuning.tasks import evaluate_task
    except ModuleNotFoundError as e:
        raise GptjaxError(f"--task: needs a library that is not installed ({e}); pip install 'gptjax[tasks]'") from None
    from gptjax.interop.open import open_model

    own = options.answers
    if own.temperature and task.labels:
        raise GptjaxError(f"--temperature: has no effect, as task {task.name} has labels and nothing is written")
    label = _label(options)
    folder = _folder_of(options, label)
    figures, predictions = evaluate_task(
        _open(options),
        task,
        own.split,
        options.limit,
        options.batch_size,
        options.dtype,
        temperature=own.temperature,
        against=open_model(own.against) if own.against else None,
    )
    shown = _table(task.metrics, figures, own.against or "baseline")
    figures |= {"temperature": own.temperature} | ({"against": own.against} if own.against else {})
    if is_run(options.model):
        figures["checkpoint"] = options.checkpoint
    if folder is None:
        return figures, f"{shown}\n\npredictions are not kept; --out FOLDER keeps them"
    path = folder / f"predictions-{label}.jsonl"
    rows = (json.dumps(dataclasses.asdict(p), ensure_ascii=False) for p in predictions)
    write_atomic(path, "".join(f"{row}\n" for row in rows))
    if not _keep_scores(folder, label, figures):
        warn(f"{folder}: is not finished, so that it has no result.json to keep the scores in; they are printed only")
    return figures | {"predictions": str(path)}, f"{shown}\n\npredictions: {path}"


def _label(options: Evaluation) -> str:
    """The task, and all that is not as usual: what is found is kept under it, beside what others have found."""
    own = options.answers
    other = own.against and re.sub(r"[^\w.-]+", "_", own.against.strip("/"))
    unusual = {
        own.split: own.split != "test",
        f"limit-{options.limit}": options.limit is not None,
        f"checkpoint-{options.checkpoint}": options.checkpoint != "last",
        f"{options.dtype}": options.dtype is not None,
        f"temperature-{own.temperature:g}": own.temperature > 0,
        f"against-{other}": own.against is not None,
    }
    return "-".join([str(options.task), *(name for name, there in unusual.items() if there)])


def _folder_of(options: Evaluation, label: str) -> Path | None:
    """Where to keep what is found. Raises `GptjaxError` for a folder that cannot take it, before a model is loaded."""
    folder = options.answers.out
    if folder is None:
        return Path(options.model) if is_run(options.model) else None
    if is_run(str(folder)):
        raise GptjaxError(f"--out {folder}: is a run folder; leave --out out to keep what is found in the run itself")
    if (path := folder / f"predictions-{label}.jsonl").exists():
        raise GptjaxError(f"{path}: exists already; choose another --out, or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise GptjaxError(f"--out {folder}: cannot be made ({e.strerror}); choose another folder") from None
    return folder


def _keep_scores(folder: Path, label: str, figures: Mapping[str, Any]) -> bool:
    """Adds the scores to result.json; not where a run is unfinished, which is told by there being none."""
    from gptjax.training.run import RESULT, open_run

    path = folder / RESULT
    if not path.exists() and is_run(str(folder)) and "imported" not in open_run(folder).provenance():
        return False
    result = read_json(path) if path.exists() else {}
    result["tasks"] = result.get("tasks", {}) | {label: figures}
    write_atomic(path, json.dumps(result, indent=2) + "\n")
    return True


def _table(metrics: Sequence[str], figures: Mapping[str, Any], other: str) -> str:
    """Each metric with its interval beside that of the trivial or the other model's answers; then other figures."""
    from gptjax.tuning.intervals import LOWER_IS_BETTER

    def row(name: str) -> tuple[str, ...]:
        shown = f"{name} (lower is better)" if name in LOWER_IS_BETTER else name
        low, high = figures[f"{name}_interval"]
        less, more = figures[f"{name}_difference_interval"]
        return (shown, f"{figures[name]:.4f}", f"{low:.4f} to {high:.4f}", f"{figures[f'{name}_baseline']:.4f}",
                f"{figures[f'{name}_difference']:+.4f}", f"{less:+.4f} to {more:+.4f}")  # fmt: skip

    rows = [("metric", "score", "95% interval", other, "difference", "95% interval"), *map(row, metrics)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows)
    others = ["loss", "bits_per_byte", "examples", "shortened", "seconds"]
    return f"{table}\n\n{_lines({name: figures[name] for name in others if name in figures})}"


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
        results = harness.run_tasks(lm, names, own.include_path, options.limit, own.num_fewshot)
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
