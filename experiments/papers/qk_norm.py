"""QK-norm lets small models learn at rates that would make them diverge.

Question   how much does the loss depend on the learning rate, with and without norms on queries and keys?
Command    GPTJAX_DATA=FOLDER gptjax repro qk_norm
           GPTJAX_DATA=FOLDER gptjax train experiments/papers/qk_norm.py (one run with QK-norm)
Cost       8 minutes on 2 CPU cores
Expected   with QK-norm the rate sensitivity is at most half of that without
Source     Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer instabilities", figure 1

The rate sensitivity is theirs: the mean over rates, 3e-4 to 3e-1, of min(loss, loss at the start) less the best loss.
A run that had to stop for numbers that were not finite counts with the loss at its start. Z-loss is 1e-4 in all runs.
Losses are means over three seeds: at the highest rates a run's last digits decide where it ends.
"""

import math
from pathlib import Path

from experiments.papers.nanogpt_shakespeare_cpu import experiment as shakespeare
from gptjax.errors import TrainingFailed
from gptjax.lab.repro import Claim, Measurement, train_run

experiment = shakespeare.override(
    name="qk_norm",
    model=dict(num_layers=3, embed_dim=96, num_heads=3, qk_norm=True),
    objective=dict(z_loss=1e-4),
    optim=dict(learning_rate=1e-2, final_learning_rate=0.0, warmup_steps=50, beta2=0.95),
    train=dict(steps=250, eval_every=0, checkpoint_every=0, sample_tokens=0),
)
SEEDS = 3
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
START, GAP = math.log(65), 0.3  # nats: of 65 characters equally likely, and what QK-norm must be better at the top rate


def final_loss(folder: Path, qk_norm: bool, rate: float, seed: int) -> float:
    name = f"{'with' if qk_norm else 'without'}-{rate:g}-seed{seed}"
    run = experiment.override({"name": name, "seed": seed, "model.qk_norm": qk_norm, "optim.learning_rate": rate})
    try:
        loss = train_run(run, folder)["val_loss"]
    except TrainingFailed:
        return START
    return START if loss is None or not math.isfinite(loss) else min(loss, START)


def measure(folder: Path) -> Measurement:
    each = {
        name: [[final_loss(folder, name == "with", rate, seed) for seed in range(SEEDS)] for rate in RATES]
        for name in ("with", "without")
    }
    losses = {name: [sum(of_rate) / SEEDS for of_rate in of_all] for name, of_all in each.items()}
    spread = {name: sum(values) / len(values) - min(values) for name, values in losses.items()}
    gap = losses["without"][-1] - losses["with"][-1]
    return Measurement(
        ours=f"rate sensitivity {spread['with']:.3f} with, {spread['without']:.3f} without; {gap:+.3f} nats at 3e-1",
        passed=spread["with"] <= 0.5 * spread["without"] and gap >= GAP,
        metrics={f"{name} QK-norm, loss by rate and seed": values for name, values in each.items()}
        | {f"{name} QK-norm, rate sensitivity": value for name, value in spread.items()}
        | {"rates": list(RATES)},
        note=f"The best losses are {min(losses['with']):.3f} with and {min(losses['without']):.3f} without.",
    )


claim = Claim(
    title="QK-norm makes the loss depend less on the learning rate",
    citation="Wortsman et al. 2023, Small-scale proxies for large-scale Transformer training instabilities, figure 1",
    published="without QK-norm the loss diverges at high rates, and rate sensitivity is several times as large",
    tolerance=f"rate sensitivity with QK-norm at most half of that without, and {GAP} nats better at 3e-1",
    minutes=8,
    measure=measure,
)
