"""muP: the best learning rate of a narrow model is that of a wide one.

Question   do logits move as far at every width under muP, and does the best rate stay where it is?
Command    GPTJAX_DATA=FOLDER gptjax repro mup
           GPTJAX_DATA=FOLDER gptjax train experiments/papers/mup.py (the widest model of the sweep, under muP)
Cost       6 minutes on 2 CPU cores
Expected   movement of a logit: exponent at most 0.1 under muP, at least 0.3 without; the best rate moves by 2 at most
Source     Yang et al. 2022, "Tensor Programs V", figures 1 and 5, appendix D.1 (coordinate check), table 8

Models have two layers and four heads, which grow wider. The check takes widths 64 to 512, with 64 as muP's own,
and looks at the third update of AdamW, the mean over two seeds. The sweep takes widths 32 to 256, with 32 as muP's own,
under muP alone, and rates a factor of 2 apart; each run has its own schedule down to 0.
"""

from pathlib import Path

import numpy as np

from experiments.papers.nanogpt_shakespeare_cpu import experiment as shakespeare
from gptjax.config import Experiment
from gptjax.lab.repro import Claim, Measurement, train_run
from gptjax.probing.coordinates import logit_changes, scaling_exponent

experiment = shakespeare.override(
    name="mup",
    model=dict(num_layers=2, embed_dim=256, num_heads=4, mup_base_width=32, init_std=0.05),
    optim=dict(learning_rate=2**-6, final_learning_rate=0.0, warmup_steps=20),
    train=dict(steps=150, eval_every=0, checkpoint_every=0, sample_tokens=0),
)
CHECKED, UPDATES, SEEDS = (64, 128, 256, 512), 3, (0, 1)
SWEPT, RATES = (32, 64, 128, 256), tuple(2.0**-k for k in range(8, 3, -1))
FLAT, STEEP, MOST = 0.1, 0.3, 2.0


def at(width: int, mup: bool, base: int, **changes: object) -> Experiment:
    return experiment.override({"model.embed_dim": width, "model.mup_base_width": base if mup else None} | changes)


def check(mup: bool) -> list[float]:
    """How far a logit moves in the first updates, by width."""
    steady = {"optim.warmup_steps": 0, "optim.schedule": "constant", "optim.learning_rate": 2e-3}
    return [
        float(np.mean([logit_changes(at(width, mup, CHECKED[0], seed=seed, **steady), UPDATES)[-1] for seed in SEEDS]))
        for width in CHECKED
    ]


def sweep(folder: Path) -> dict[int, list[float]]:
    """The final validation loss under muP by width and rate."""
    losses: dict[int, list[float]] = {}
    for width in SWEPT:
        for rate in RATES:
            run = at(width, True, SWEPT[0], **{"name": f"mup-{width}-{rate:g}", "optim.learning_rate": rate})
            losses.setdefault(width, []).append(train_run(run, folder)["val_loss"])
    return losses


def measure(folder: Path) -> Measurement:
    moved = {name: check(name == "mup") for name in ("mup", "standard")}
    slopes = {name: scaling_exponent(CHECKED, values) for name, values in moved.items()}
    losses = sweep(folder)
    best = [RATES[int(np.argmin(values))] for values in losses.values()]
    shift = max(best) / min(best)
    return Measurement(
        ours=f"exponent {slopes['mup']:.2f} with muP, {slopes['standard']:.2f} without; best rates within a factor of "
        f"{shift:g} with muP",
        passed=slopes["mup"] <= FLAT and slopes["standard"] >= STEEP and shift <= MOST,
        metrics={f"{name}, movement at {CHECKED}": values for name, values in moved.items()}
        | {f"{name}, exponent": value for name, value in slopes.items()}
        | {f"loss at width {width}": values for width, values in losses.items()}
        | {"rates": list(RATES), f"best rates at {SWEPT}": best},
        note=f"The best rates at widths {SWEPT[0]} to {SWEPT[-1]} are {', '.join(f'{r:g}' for r in best)}.",
    )


claim = Claim(
    title="Under muP logits move as far at every width, and the best learning rate stays",
    citation="Yang et al. 2022, Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer",
    published="activations do not grow with width under muP; the best rate is the same at every width",
    tolerance=f"exponent <= {FLAT} with muP, >= {STEEP} without; best rates within {MOST:g}x over widths 32 to 256",
    minutes=6,
    measure=measure,
)
