"""From a checkpoint to a train state, or to the weights of a model for inference."""

from typing import Any

import jax

from gptjax import sharding
from gptjax.config import Experiment
from gptjax.errors import PromptError, RunError
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.sampling import SamplingParams
from gptjax.model.weights import merge_lora
from gptjax.training import checkpoint
from gptjax.training.checkpoint import Checkpoint
from gptjax.training.optim import evaluation_leaves, evaluation_params, make_optimizer
from gptjax.training.run import EXPERIMENT, GENERATION, Run
from gptjax.training.state import TrainState, Weights, abstract_state, new_health, state_mismatches

MOST_SHOWN = 8  # differences between a checkpoint and an experiment that a message lists


def restore_state(chosen: Checkpoint, abstract: TrainState, experiment: Experiment) -> TrainState:
    """The state of a verified checkpoint, with the shardings of `abstract`.

    Raises `RunError` naming every array of another shape or dtype than the experiment's, and the field that decides it.
    """
    wanted, saved_shapes = _saved_parts(abstract, chosen), checkpoint.saved_arrays(chosen)
    if _is_weights_only(saved_shapes):
        raise RunError(
            f"{chosen.folder}: holds imported weights without a train state; to train on, set init to this run in an "
            "experiment with another --run-dir"
        )
    _check_match(chosen, saved_shapes, wanted, experiment)
    saved = checkpoint.restore(chosen, wanted)
    if chosen.format == 1:
        saved["health"] = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), new_health(), abstract.health)
    return TrainState(**saved)


def load_params(run: Run, which: str) -> tuple[Any, int]:
    """The weights for evaluation and sampling of the checkpoint called `which`, on one device; and its step.

    No other part of the state is read.
    """
    chosen = checkpoint.choose(run.checkpoints, which)
    abstract = abstract_state(run.experiment, make_optimizer(run.experiment), sharding.one_device())
    saved_shapes = checkpoint.saved_arrays(chosen)
    if _is_weights_only(saved_shapes):
        wanted = Weights(abstract.step, abstract.params)._asdict()
        _check_match(chosen, saved_shapes, wanted, run.experiment)
        return checkpoint.restore(chosen, wanted)["params"], chosen.step
    wanted = _saved_parts(abstract, chosen)
    _check_match(chosen, saved_shapes, wanted, run.experiment)
    params, opt_state = evaluation_leaves(abstract.params, abstract.opt_state, checkpoint.UNREAD)
    unread = jax.tree.map(lambda _: checkpoint.UNREAD, wanted)
    saved = checkpoint.restore(chosen, unread | {"params": params, "opt_state": opt_state})
    return evaluation_params(saved["params"], saved["opt_state"]), chosen.step


def open_trained(run: Run, checkpoint: str = "last", merge: bool = True) -> Pretrained:
    """The model in a run folder. LoRA's weights are merged, or with `merge` False stay separate."""
    params, _ = load_params(run, checkpoint)
    model = run.experiment.model
    if merge:
        model, params = merge_lora(model, params)
    labels = run.experiment.data.labels if model.num_classes else ()
    if len(labels) != model.num_classes:
        raise RunError(
            f"{run.folder / EXPERIMENT}: is damaged (model.num_classes = {model.num_classes}, but data.labels has "
            f"{len(labels)})"
        )
    settings = run.generation_settings()
    try:
        SamplingParams(**settings.get("recommended", {}))
        return Pretrained(
            name=run.experiment.name,
            model=model,
            params=params,
            tokenizer=run.tokenizer(),
            labels=labels,
            generation_config=settings.get("recommended", {}),
            stop_tokens=tuple(map(int, settings.get("stop_tokens", ()))),
            chat_template=settings.get("chat_template"),
            extra_generation_config=dict(settings.get("passed_on", {})),
        )
    except (TypeError, ValueError, PromptError) as e:
        raise RunError(f"{run.folder / GENERATION}: is damaged ({e})") from None


def _saved_parts(abstract: TrainState, chosen: Checkpoint) -> dict[str, Any]:
    return {name: part for name, part in abstract._asdict().items() if chosen.format > 1 or name != "health"}


def _is_weights_only(saved: dict[str, jax.ShapeDtypeStruct]) -> bool:
    return all(name == "step" or name.startswith("params.") for name in saved)


def _check_match(
    chosen: Checkpoint, saved: dict[str, jax.ShapeDtypeStruct], wanted: dict[str, Any], experiment: Experiment
) -> None:
    found = state_mismatches(saved, wanted, experiment)
    if not found:
        return
    lines = [f"  - {line}" for line in found[:MOST_SHOWN]]
    if len(found) > MOST_SHOWN:
        lines.append(f"  and {len(found) - MOST_SHOWN} others")
    raise RunError(
        f"{chosen.folder}: does not hold the state of this experiment; use the fields that it was trained with:\n"
        + "\n".join(lines)
    )
