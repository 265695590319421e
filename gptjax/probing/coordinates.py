"""The coordinate check of muP: how far the first updates move what a model says, at one width after the other.

In a parametrisation that lets rates be taken from a narrow model to a wide one, a typical logit moves as far at every
width (Yang et al. 2022, appendix D.1); in the standard one it moves further the wider the model is.
"""

from collections.abc import Sequence

import jax
import numpy as np

from gptjax.config import Experiment
from gptjax.model.gpt import GPT
from gptjax.sharding import one_device
from gptjax.training.step import batch_logits
from gptjax.training.train_setup import build_train_setup, first_state


def movement(experiment: Experiment, steps: int) -> np.ndarray:
    """The mean distance |logit after - logit before| after each of the first updates: float64 [steps].

    Logits are those of the first batch, at every place and token, without dropout. One device is used.
    """
    setup = build_train_setup(experiment, one_device())
    model = GPT(setup.experiment.model)
    with jax.set_mesh(setup.mesh):
        state = first_state(setup, None)
        looked_at = jax.tree.map(lambda x: x[0], setup.batches.device_batch(0, setup.mesh))
        say = jax.jit(lambda params: batch_logits(params, looked_at, model, {}))
        before, moved = np.asarray(say(state.params), np.float64), []
        for step in range(steps):
            state, _ = setup.train_step(state, setup.batch(state, step)[0])
            moved.append(np.abs(np.asarray(say(state.params), np.float64) - before).mean())
    return np.array(moved)


def growth(widths: Sequence[int], moved: Sequence[float]) -> float:
    """The exponent with which a movement grows with the width: the slope in logarithms, by least squares."""
    return float(np.polyfit(np.log(widths), np.log(moved), 1)[0])
