"""The coordinate check of muP: how far the first updates move the logits, at one width after another.

In a parametrisation whose learning rates transfer from a narrow model to a wide one, a typical logit moves equally far
at every width (Yang et al. 2022, appendix D.1); in the standard one it moves further in a wider model.
"""

from collections.abc import Sequence

import jax
import numpy as np

from gptjax.config import Experiment
from gptjax.model.gpt import GPT
from gptjax.objectives.losses import batch_logits
from gptjax.sharding import one_device
from gptjax.training.train_setup import build_train_setup, first_state


def logit_changes(experiment: Experiment, steps: int) -> np.ndarray:
    """The mean |logit after - logit before| after each of the first updates: float64 [steps].

    The logits are those of the first batch, at every position and token, without dropout. Uses one device.
    """
    setup = build_train_setup(experiment, one_device())
    model = GPT(setup.experiment.model)
    with jax.set_mesh(setup.mesh):
        state = first_state(setup, None)
        batch = jax.tree.map(lambda x: x[0], setup.batches.device_batch(0, setup.mesh))
        compute_logits = jax.jit(lambda params: batch_logits(params, batch, model, {}))
        before = np.asarray(compute_logits(state.params), np.float64)
        changes = []
        for step in range(steps):
            state, _ = setup.train_step(state, setup.batch(state, step)[0])
            after = np.asarray(compute_logits(state.params), np.float64)
            changes.append(np.abs(after - before).mean())
    return np.array(changes)


def scaling_exponent(widths: Sequence[int], changes: Sequence[float]) -> float:
    """The exponent with which the change grows with the width: the slope in log-log space, by least squares."""
    return float(np.polyfit(np.log(widths), np.log(changes), 1)[0])
