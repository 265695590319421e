"""`gptjax eval`: evaluates a model on its own validation text, on any other text, or on tasks."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from gptjax.commands import check_unused, is_run, parse, start_jax, without_run
from gptjax.commands.eval_options import (
    HARNESS,
    Evaluation,
    HarnessOptions,
    TaskOptions,
    TextOptions,
    format_metrics,
    open_pretrained,
)
from gptjax.errors import DataError, GptjaxError


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


def _check_unused(options: Evaluation) -> None:
    """Raises `GptjaxError` for options without effect."""
    from gptjax.data.files import TEXT, ending

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
    if options.data and all(source == "pydoc" or ending(source) in TEXT for source in options.data):
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
