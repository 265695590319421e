"""`gptjax eval`: evaluates a model on its own validation text, on any other text, or on tasks."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from gptjax.commands import check_unused, is_run, parse, start_jax, without_run
from gptjax.commands.options import (
    Checkpoint,
    DtypeOption,
    FileOption,
    FloatOption,
    FolderOption,
    IntOption,
    ModelArgument,
    ModelOption,
    TextOption,
)
from gptjax.errors import DataError, GptjaxError

if TYPE_CHECKING:
    from gptjax.inference.pretrained import Pretrained

HARNESS = "lm_eval:"  # prefix of the tasks of the lm-evaluation-harness


@dataclass(frozen=True)
class TextOptions:
    """For --data."""

    column: Annotated[str, tyro.conf.arg(metavar="NAME")] = "text"  # the text, in jsonl, csv, parquet and hub data
    hub_config: TextOption = None  # configuration of a hub data set
    hub_split: Annotated[str, tyro.conf.arg(metavar="NAME")] = "test"  # split of a hub data set
    max_documents: IntOption = None  # read at most this many documents of each source
    stride: IntOption = None  # tokens by which a window moves; None: windows do not overlap
    context: IntOption = None  # tokens of a window; None: the model's context length
    by_position: bool = False  # also print the loss by context size
    plot: FileOption = None  # a PNG file to plot that into


@dataclass(frozen=True)
class TaskOptions:
    """For gptjax's own tasks in --tasks."""

    split: Literal["test", "validation"] = "test"  # of the task's examples
    out: FolderOption = None  # folder for predictions and scores; None: the run folder, if the model is a run
    temperature: Annotated[float, tyro.conf.arg(metavar="X")] = 0.0  # of the generated answers; 0: greedy decoding
    compare_with: ModelOption = None  # a model to compare with, instead of the baseline


@dataclass(frozen=True)
class HarnessOptions:
    """For lm_eval: tasks in --tasks."""

    include_path: FolderOption = None  # a folder with YAML files of your own tasks
    num_fewshot: IntOption = None  # examples shown before each question; None: the task's default


@dataclass(frozen=True)
class Evaluation:
    """Evaluate a run on its validation text, or any model on other text (--data) or on tasks (--tasks)."""

    model: ModelArgument
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """files or folders (txt, md, jsonl, csv, parquet), pydoc, or hub:NAME"""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK ...")] = ()
    """gptjax's own tasks, such as sentiment; lm_eval:NAME or lm_eval:FILE.yaml for the lm-evaluation-harness"""
    limit: FloatOption = None  # with --tasks: the number of examples; below 1: a fraction of them
    batch_size: int = 8  # with --data or --tasks: windows or requests computed at once
    dtype: DtypeOption = None  # with --data or --tasks: None: the model's own; int8: 8-bit weights
    json: bool = False  # print one JSON object
    checkpoint: Checkpoint = "last"  # of a run
    text: OmitArgPrefixes[TextOptions] = dataclasses.field(default_factory=TextOptions)
    task: OmitArgPrefixes[TaskOptions] = dataclasses.field(default_factory=TaskOptions)
    lm_eval: OmitArgPrefixes[HarnessOptions] = dataclasses.field(default_factory=HarnessOptions)

    @property
    def own_tasks(self) -> list[str]:
        return list(dict.fromkeys(name for name in self.tasks if not name.startswith(HARNESS)))

    @property
    def harness_tasks(self) -> list[str]:
        """The names for lm_eval; `lm_eval:a,b` is two."""
        groups = [name.removeprefix(HARNESS) for name in self.tasks if name.startswith(HARNESS)]
        return [name for group in groups for name in group.split(",") if name]


def evaluate(arguments: list[str]) -> None:
    """MODEL -> metrics on stdout."""
    options: Evaluation = parse(Evaluation, arguments, "eval")
    _check_unused(options)
    if options.data:
        from gptjax.commands.eval_text import evaluate_data

        metrics, text = evaluate_data(options)
    elif options.tasks:
        metrics, text = _evaluate_tasks(options)
    else:
        metrics, text = _evaluate_validation_text(options)
    print(json.dumps(metrics) if options.json else text)


def open_pretrained(options: Evaluation) -> "Pretrained":
    start_jax()
    from gptjax.interop.open import open_model

    return open_model(options.model, options.checkpoint)


def format_metrics(metrics: dict[str, Any]) -> str:
    """One line per metric, with its unit."""
    is_token_loss = any(name.endswith("bits_per_byte") for name in metrics)
    width = max(map(len, metrics))
    lines = []
    for name, value in metrics.items():
        line = f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value:.4f}"
        if name.endswith("bits_per_byte"):
            line += " bits/byte"
        elif is_token_loss and name in ("loss", "val_loss"):
            line += " nats/token"
        lines.append(line)
    return "\n".join(lines)


def _check_unused(options: Evaluation) -> None:
    """Raises `GptjaxError` for options without effect."""
    from gptjax.data.corpus import TEXT

    if options.data and options.tasks:
        raise GptjaxError("--data and --tasks: give only one of them")
    unused = without_run(options.model)
    if not options.own_tasks:
        unused["no effect without one of gptjax's own --tasks"] = [f.name for f in dataclasses.fields(TaskOptions)]
    if not options.harness_tasks:
        unused[f"no effect without --tasks {HARNESS}NAME"] = [f.name for f in dataclasses.fields(HarnessOptions)]
    if not options.data:
        unused["no effect without --data"] = [f.name for f in dataclasses.fields(TextOptions)]
    if not options.tasks:
        unused["no effect without --tasks"] = ["limit"]
    if not (options.data or options.tasks):
        unused["no effect without --data or --tasks"] = ["batch_size", "dtype"]
    if options.data and not any(source.startswith("hub:") for source in options.data):
        unused["no effect without --data hub:NAME"] = ["hub_config", "hub_split"]
    if options.data and all(source == "pydoc" or source.endswith(TEXT) for source in options.data):
        unused["no effect on plain text, which has no columns"] = ["column"]
    check_unused(options, unused)


def _evaluate_tasks(options: Evaluation) -> tuple[dict[str, Any], str]:
    """The results of all tasks; of a single task, or of lm_eval's tasks alone, without the name around them."""
    from gptjax.commands import eval_harness, eval_tasks

    own_tasks = eval_tasks.find_tasks(options)
    if options.harness_tasks:
        eval_harness.check_installed()
    evaluations = [eval_tasks.prepare(options, task) for task in own_tasks]  # checks all before a model is loaded
    pretrained = open_pretrained(options)
    results = {evaluation.task.name: evaluation.run(pretrained) for evaluation in evaluations}
    if options.harness_tasks:
        results["lm_eval"] = eval_harness.evaluate_harness(options, pretrained)
    if len(results) == 1:
        return next(iter(results.values()))
    text = "\n\n".join(f"{name}\n\n{text}" for name, (_, text) in results.items())
    return {name: metrics for name, (metrics, _) in results.items()}, text


def _evaluate_validation_text(options: Evaluation) -> tuple[dict[str, Any], str]:
    from gptjax.training.run import open_run

    folder = Path(options.model)
    problem = None
    if is_run(options.model):
        if "imported" in open_run(folder).provenance():
            problem = "contains imported weights"
    elif (folder / "config.json").exists() or _may_be_hub_name(options.model):
        problem = "is not a run folder"
    if problem:
        raise DataError(
            f"{options.model}: {problem}, so it has no validation text of its own; choose what to evaluate on with "
            "--data FILE or --tasks TASK"
        )
    run = open_run(folder)
    start_jax()
    from gptjax.interop.open import open_local
    from gptjax.training.evaluation import evaluate_run

    metrics = evaluate_run(run, options.checkpoint, open_local)
    return metrics, format_metrics(metrics)


def _may_be_hub_name(model: str) -> bool:
    return not Path(model).exists() and not model.startswith((".", "/", "~")) and model.count("/") <= 1
