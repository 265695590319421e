"""Pre-norm keeps the last layer's gradients small at the start, the more so the deeper the model.

Question   how does the gradient of the last FFN at initialisation depend on depth, with norms before and after?
Command    gptjax repro pre_ln
           gptjax train experiments/papers/pre_ln.py (trains the pre-norm model of six layers, which no figure needs)
Cost       a minute on 2 CPU cores; no training
Expected   pre-norm falls like 1 / sqrt(layers), post-norm does not fall
Source     Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", theorem 1 and figure 3

As in the paper, matrices begin at Xavier's scale and residual branches are not scaled by depth. Norms are those of the
gradient of the mean loss with respect to the second matrix of the last FFN, averaged over seeds.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from gptjax.config import DataConfig, Experiment, ModelConfig, OptimConfig, TrainConfig
from gptjax.lab.repro import Claim, Measurement
from gptjax.model.gpt import GPT
from gptjax.sharding import one_device
from gptjax.training.step import TOKEN_LOSS, mean_gradient
from gptjax.training.train_setup import build_train_setup, first_state

experiment = Experiment(
    name="pre_ln",
    model=ModelConfig(
        context_length=64,
        num_layers=6,
        embed_dim=128,
        num_heads=4,
        ffn="relu",
        init_std=(2 / (128 + 4 * 128)) ** 0.5,
        init_depth_scaled=False,
        tie_embeddings=False,
    ),
    data=DataConfig(source="pydoc"),
    optim=OptimConfig(learning_rate=1e-3),
    train=TrainConfig(steps=500, batch_size=8, eval_every=0),
)
DEPTHS, SEEDS = (2, 4, 8, 16), (0, 1, 2)


def last_gradient(placement: str, depth: int, seed: int) -> float:
    """The norm of the last FFN's gradient before the first update."""
    changes = {"model.norm_placement": placement, "model.num_layers": depth, "seed": seed}
    setup = build_train_setup(experiment.override(changes), one_device())
    with jax.set_mesh(setup.mesh):
        state = first_state(setup, None)
        model = GPT(dataclasses.replace(setup.experiment.model, dropout=0.0))
        _, gradient = mean_gradient(model, TOKEN_LOSS)(state, setup.batches.device_batch(0, setup.mesh), None)
    return float(np.linalg.norm(np.asarray(gradient["blocks"]["ffn"]["down"][-1], np.float64)))


def measure(folder: Path) -> Measurement:
    norms = {
        placement: [float(np.mean([last_gradient(placement, depth, seed) for seed in SEEDS])) for depth in DEPTHS]
        for placement in ("pre", "post")
    }
    slopes = {name: float(np.polyfit(np.log(DEPTHS), np.log(values), 1)[0]) for name, values in norms.items()}
    return Measurement(
        ours=f"log-slope {slopes['pre']:.2f} with pre-norm, {slopes['post']:.2f} with post-norm",
        passed=-0.6 <= slopes["pre"] <= -0.3 and slopes["post"] >= -0.1,
        metrics={f"{name}-norm, norm by depth": values for name, values in norms.items()}
        | {f"{name}-norm, log-slope": slope for name, slope in slopes.items()}
        | {"depths": list(DEPTHS), "seeds": list(SEEDS)},
        note=f"From {DEPTHS[0]} to {DEPTHS[-1]} layers the norm goes from {norms['pre'][0]:.3g} to "
        f"{norms['pre'][-1]:.3g} with pre-norm, from {norms['post'][0]:.3g} to {norms['post'][-1]:.3g} with post-norm.",
    )


claim = Claim(
    title="At initialisation the last layer's gradient falls like 1 / sqrt(layers) with pre-norm, not with post-norm",
    citation="Xiong et al. 2020, On Layer Normalization in the Transformer Architecture, theorem 1 and figure 3",
    published="pre-norm: proportional to 1 / sqrt(layers), a log-slope of -0.5; post-norm: independent of them",
    tolerance="log-slope over 2 to 16 layers: pre-norm in [-0.6, -0.3], post-norm at least -0.1",
    minutes=1,
    measure=measure,
)
