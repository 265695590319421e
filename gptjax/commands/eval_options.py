"""What the evaluations of `gptjax eval` share: the options, how the model is opened, how metrics are printed."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from gptjax.commands import start_jax
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
