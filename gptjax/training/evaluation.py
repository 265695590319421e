"""The loss over the whole validation text, during a run and afterwards."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gptjax import random_streams, sharding
from gptjax.data.objectives import Batch
from gptjax.sharding import one_device
from gptjax.training import checkpoint
from gptjax.training.initial import ModelLoader
from gptjax.training.metrics import num_params
from gptjax.training.optim import evaluation_params
from gptjax.training.run import Run
from gptjax.training.state import TrainState
from gptjax.training.train_setup import TrainSetup, reopen, restore_state
from gptjax.tuning.on_policy import Rollout

Figures = dict[str, Any]


def evaluate(setup: TrainSetup, state: TrainState, heartbeat: Callable[[], None] = lambda: None) -> Figures:
    """What the loss shows of the whole validation text, as val_loss and so on.

    Where that is nats a token, bits a byte as well, which do not depend on the tokenizer: they count the bytes of the
    tokens that are asked for; `eos_id` has none, its cost is spread over them. Where the model writes answers of
    its own, val_score is the mean of their scores, by the same draws each time, and val_loss that reversed.
    """
    if setup.objective.rollout:
        return _evaluate_written(setup, setup.objective.rollout, state, heartbeat)
    sums, counts, num_bytes = [], [], 0
    for batch in setup.batches.validation():
        heartbeat()
        shown, count = setup.eval_step(state, sharding.shard_from_host(batch, ("batch", "length"), setup.mesh))
        sums.append(shown)
        counts.append(count)
        num_bytes += _num_bytes(setup, batch)
    total = _total(counts)
    figures = {f"val_{name}": _total([shown[name] for shown in sums]) / total for name in sums[0]}
    if setup.objective.of_tokens:
        bits = figures["val_loss"] * total / math.log(2) / max(num_bytes, 1)
        return figures | {"val_bits_per_byte": bits, "val_tokens": int(total), "val_bytes": num_bytes}
    return figures | {"val_answers": int(total)}


def _num_bytes(setup: TrainSetup, batch: Batch) -> int:
    """Of the tokens that a batch asks for; 0 where it asks for something else."""
    if not setup.objective.of_tokens:
        return 0
    pieces, asked = setup.store.tokenizer.id_to_bytes, batch.targets[batch.loss_weights > 0]
    return sum(len(pieces[i]) for i in asked if i < len(pieces))  # the ids of an objective's own stand for no text


def _total(parts: list[jax.Array]) -> float:
    return float(np.sum(np.array(jax.device_get(parts), np.float64)))


def _evaluate_written(setup: TrainSetup, rollout: Rollout, state: TrainState, heartbeat: Callable[[], None]) -> Figures:
    params, scores = evaluation_params(state.params, state.opt_state), []
    for number, batch in enumerate(setup.batches.validation()):
        heartbeat()
        questions = rollout.questions(batch)
        made = rollout.write(params, questions, (setup.experiment.seed, random_streams.ON_POLICY_VALIDATION, number))
        scores.append(rollout.scores(questions, made))
    score = float(np.concatenate(scores).mean())
    return {"val_loss": -score, "val_score": score, "val_answers": sum(map(len, scores))}


def evaluate_run(run: Run, which: str = "last", open_init: ModelLoader | None = None) -> Figures:
    """`evaluate` for a checkpoint of a run folder, on one device; with the step and size of the model.

    `open_init` is needed as for `train`, where the loss looks at another model besides.
    """
    setup = reopen(run, one_device(), open_init)
    chosen = checkpoint.choose(run.checkpoints, which)
    with jax.set_mesh(setup.mesh):
        state = restore_state(chosen, setup.abstract, setup.experiment)
        began = time.perf_counter()
        figures = evaluate(setup, state)
    seconds = time.perf_counter() - began
    position = chosen.position or setup.batches.position(chosen.step)
    return figures | {
        "steps": chosen.step,
        "tokens": position.tokens,
        "seconds": seconds,
        **({"tokens_per_second": figures["val_tokens"] / seconds} if "val_tokens" in figures else {}),
        "num_params": num_params(setup.experiment.model)["total"],
    }
