"""`gptjax eval MODEL --tasks NAME`: a model on one of gptjax's own tasks, with intervals and predictions."""

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax.atomic_io import read_json, write_atomic
from gptjax.commands import is_run
from gptjax.commands.eval_options import HARNESS, format_metrics
from gptjax.errors import DataError, GptjaxError, warn

if TYPE_CHECKING:
    from gptjax.commands.eval_options import Evaluation
    from gptjax.data.tasks import Task
    from gptjax.inference.pretrained import Pretrained


def find_tasks(options: "Evaluation") -> list["Task"]:
    """The own tasks that are named. Raises `DataError` for a name that is none."""
    from gptjax.data.tasks import TASKS

    for name in options.own_tasks:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise DataError(
                f"--tasks {name}: no such task; {hint}There are {', '.join(TASKS)}. For a task of the "
                f"lm-evaluation-harness write {HARNESS}{name}"
            )
    return [TASKS[name] for name in options.own_tasks]


@dataclass(frozen=True)
class TaskEvaluation:
    """The evaluation of one task, whose options are checked."""

    options: "Evaluation"
    task: "Task"
    label: str  # of the results, in files and in result.json
    folder: Path | None  # where to save predictions and scores

    def run(self, pretrained: "Pretrained") -> tuple[dict[str, Any], str]:
        """The metrics, and the text to print. Saves predictions and scores if there is a folder."""
        from gptjax.interop.open import open_model
        from gptjax.tuning.tasks import evaluate_task

        options, compare_with = self.options, self.options.task.compare_with
        metrics, predictions = evaluate_task(
            pretrained,
            self.task,
            options.task.split,
            options.limit,
            options.batch_size,
            options.dtype,
            temperature=options.task.temperature,
            against=open_model(compare_with) if compare_with else None,
        )
        text = _format_scores(self.task.metrics, metrics, compare_with or "baseline")
        metrics["temperature"] = options.task.temperature
        if compare_with:
            metrics["against"] = compare_with
        if is_run(options.model):
            metrics["checkpoint"] = options.checkpoint
        if self.folder is None:
            return metrics, f"{text}\n\npredictions are not saved; --out FOLDER saves them"
        path = self.folder / f"predictions-{self.label}.jsonl"
        rows = (json.dumps(dataclasses.asdict(p), ensure_ascii=False) for p in predictions)
        write_atomic(path, "".join(f"{row}\n" for row in rows))
        if not _save_scores(self.folder, self.label, metrics):
            warn(f"{self.folder}: is not finished and has no result.json, so the scores are only printed, not saved")
        return metrics | {"predictions": str(path)}, f"{text}\n\npredictions: {path}"


def prepare(options: "Evaluation", task: "Task") -> TaskEvaluation:
    """Checks the options for a task. Raises `GptjaxError` if it cannot be evaluated, before a model is loaded."""
    try:
        import gptjax.tuning.tasks  # noqa: F401
    except ModuleNotFoundError as e:
        raise GptjaxError(
            f"--tasks: needs a library that is not installed ({e}); pip install 'gptjax[tasks]'"
        ) from None
    if options.task.temperature and task.labels:
        raise GptjaxError(f"--temperature: has no effect, because task {task.name} has labels and generates no text")
    label = _label(options, task.name)
    return TaskEvaluation(options, task, label, _prepare_folder(options, label))


def _label(options: "Evaluation", task: str) -> str:
    """The task and all options that differ from their defaults, so that results are kept apart."""
    own = options.task
    parts = [task]
    if own.split != "test":
        parts.append(own.split)
    if options.limit is not None:
        parts.append(f"limit-{options.limit}")
    if options.checkpoint != "last":
        parts.append(f"checkpoint-{options.checkpoint}")
    if options.dtype is not None:
        parts.append(options.dtype)
    if own.temperature > 0:
        parts.append(f"temperature-{own.temperature:g}")
    if own.compare_with is not None:
        parts.append("against-" + re.sub(r"[^\w.-]+", "_", own.compare_with.strip("/")))
    return "-".join(parts)


def _prepare_folder(options: "Evaluation", label: str) -> Path | None:
    """The folder for the results; created if it is new. Raises `GptjaxError` if it cannot be used."""
    folder = options.task.out
    if folder is None:
        return Path(options.model) if is_run(options.model) else None
    if is_run(str(folder)):
        raise GptjaxError(f"--out {folder}: is a run folder; remove --out to save the results in the run itself")
    if (path := folder / f"predictions-{label}.jsonl").exists():
        raise GptjaxError(f"{path}: exists already; choose another --out, or delete the file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise GptjaxError(f"--out {folder}: cannot be created ({e.strerror}); choose another folder") from None
    return folder


def _save_scores(folder: Path, label: str, metrics: Mapping[str, Any]) -> bool:
    """Adds the scores to result.json. Not in an unfinished run: without result.json it counts as unfinished."""
    from gptjax.training.run import RESULT, open_run

    path = folder / RESULT
    if not path.exists() and is_run(str(folder)) and "imported" not in open_run(folder).provenance():
        return False
    result = read_json(path) if path.exists() else {}
    result["tasks"] = result.get("tasks", {}) | {label: metrics}
    write_atomic(path, json.dumps(result, indent=2) + "\n")
    return True


def _format_scores(names: Sequence[str], metrics: Mapping[str, Any], compared_with: str) -> str:
    """A table of scores with their intervals and the difference to the baseline or other model; then other metrics."""
    from gptjax.tuning.intervals import LOWER_IS_BETTER

    rows = [("metric", "score", "95% interval", compared_with, "difference", "95% interval")]
    for name in names:
        low, high = metrics[f"{name}_interval"]
        difference_low, difference_high = metrics[f"{name}_difference_interval"]
        rows.append(
            (
                f"{name} (lower is better)" if name in LOWER_IS_BETTER else name,
                f"{metrics[name]:.4f}",
                f"{low:.4f} to {high:.4f}",
                f"{metrics[f'{name}_baseline']:.4f}",
                f"{metrics[f'{name}_difference']:+.4f}",
                f"{difference_low:+.4f} to {difference_high:+.4f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows)
    others = ["loss", "bits_per_byte", "examples", "shortened", "seconds"]
    return f"{table}\n\n{format_metrics({name: metrics[name] for name in others if name in metrics})}"
