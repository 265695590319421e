"""The loss of the validation text, during a run and afterwards."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gptjax import random_streams, sharding
from gptjax.data.batches import Batch
from gptjax.model.size import num_params
from gptjax.objectives.base import Rollout
from gptjax.sharding import one_device
from gptjax.training import checkpoint
from gptjax.training.initial import ModelLoader
from gptjax.training.optim import evaluation_params
from gptjax.training.restore import restore_state
from gptjax.training.run import Run
from gptjax.training.state import TrainState
from gptjax.training.train_setup import TrainSetup, reopen

ScalarMetrics = dict[str, Any]


def evaluate(setup: TrainSetup, state: TrainState, heartbeat: Callable[[], None] = lambda: None) -> ScalarMetrics:
    """The metrics of the loss over all validation text: val_loss and others.

    If the loss is in nats/token, also bits/byte, which does not depend on the tokenizer: the loss of all targets
    divided by their bytes. `eos_id` has no bytes. On-policy objectives sample answers with the same seeds each time;
    val_score is their mean reward, and val_loss is -val_score.
    """
    if setup.objective.rollout:
        return _evaluate_on_policy(setup, setup.objective.rollout, state, heartbeat)
    sums: list[Any] = []
    normalizers: list[jax.Array] = []
    num_bytes = 0
    for batch in setup.batches.validation():
        heartbeat()
        metrics, normalizer = setup.eval_step(state, sharding.shard_from_host(batch, ("batch", "length"), setup.mesh))
        sums.append(metrics)
        normalizers.append(normalizer)
        num_bytes += _num_bytes(setup, batch)
    total = _total(normalizers)
    means: ScalarMetrics = {f"val_{name}": _total([part[name] for part in sums]) / total for name in sums[0]}
    if setup.objective.is_token_nll:
        bits = means["val_loss"] * total / math.log(2) / max(num_bytes, 1)
        return means | {"val_bits_per_byte": bits, "val_tokens": int(total), "val_bytes": num_bytes}
    return means | {"val_answers": int(total)}


def _num_bytes(setup: TrainSetup, batch: Batch) -> int:
    """The bytes of the targets of a batch; 0 if they are no tokens."""
    if not setup.objective.is_token_nll:
        return 0
    id_to_bytes = setup.store.tokenizer.id_to_bytes
    targets = batch.targets[batch.loss_weights > 0]
    return sum(len(id_to_bytes[i]) for i in targets if i < len(id_to_bytes))  # extra tokens of an objective have none


def _total(parts: list[jax.Array]) -> float:
    return float(np.sum(np.array(jax.device_get(parts), np.float64)))


def _evaluate_on_policy(
    setup: TrainSetup, rollout: Rollout, state: TrainState, heartbeat: Callable[[], None]
) -> ScalarMetrics:
    params = evaluation_params(state.params, state.opt_state)
    rewards: list[np.ndarray] = []
    for number, batch in enumerate(setup.batches.validation()):
        heartbeat()
        prompts = rollout.prompts(batch)
        samples = rollout.sample(params, prompts, (setup.experiment.seed, random_streams.ON_POLICY_VALIDATION, number))
        rewards.append(rollout.rewards(prompts, samples))
    mean = float(np.concatenate(rewards).mean())
    return {"val_loss": -mean, "val_score": mean, "val_answers": sum(map(len, rewards))}


def evaluate_run(run: Run, which: str = "last", open_init: ModelLoader | None = None) -> ScalarMetrics:
    """`evaluate` for a checkpoint of a run folder, on one device; with the step and the size of the model.

    `open_init`: as for `train`; needed if the loss uses a reference model.
    """
    setup = reopen(run, one_device(), open_init)
    chosen = checkpoint.choose(run.checkpoints, which)
    with jax.set_mesh(setup.mesh):
        state = restore_state(chosen, setup.abstract, setup.experiment)
        began = time.perf_counter()
        metrics = evaluate(setup, state)
    seconds = time.perf_counter() - began
    position = chosen.position or setup.batches.position(chosen.step)
    return metrics | {
        "steps": chosen.step,
        "tokens": position.tokens,
        "seconds": seconds,
        **({"tokens_per_second": metrics["val_tokens"] / seconds} if "val_tokens" in metrics else {}),
        "num_params": num_params(setup.experiment.model)["total"],
    }
