"""NAME: write your question here.

Question   does the published result hold?
Command    gptjax repro NAME.py
Cost       a minute on 2 CPU cores, no download
Expected   the claim passes

A claim compares our result with a published one, by a rule that is fixed before the measurement. The same command
resumes it; results are kept in runs/repro.
"""

from pathlib import Path

from gptjax.config import DataConfig, Experiment, ModelConfig, OptimConfig, TrainConfig
from gptjax.lab.repro import Claim, Measurement, train_run

experiment = Experiment(
    name="NAME",
    model=ModelConfig(context_length=64, num_layers=2, embed_dim=64, num_heads=2, bias=False, layers="unrolled"),
    data=DataConfig(source="pydoc", tokenizer="byte"),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=20, beta2=0.95),
    train=TrainConfig(steps=200, batch_size=8, eval_every=0, checkpoint_every=100, sample_tokens=0),
)
SEEDS = (0, 1)


def measure(folder: Path) -> Measurement:
    """Trains in `folder`, which is kept, and compares the results."""
    losses: dict[str, list[float]] = {"layernorm": [], "rmsnorm": []}
    for norm, values in losses.items():
        for seed in SEEDS:
            run = experiment.override({"name": f"{norm}-{seed}", "model.norm": norm, "seed": seed})
            values.append(train_run(run, folder)["val_loss"])
    gap = sum(losses["rmsnorm"]) / len(SEEDS) - sum(losses["layernorm"]) / len(SEEDS)
    return Measurement(
        ours=f"rmsnorm {gap:+.4f} nats/token",  # in the form of `published`
        passed=abs(gap) < 0.05,  # the rule of `tolerance`
        metrics={"val_loss by seed": losses},  # all numbers behind it, for the page
    )


claim = Claim(
    title="RMSNorm is as good as layernorm",
    citation="Zhang & Sennrich 2019, Root Mean Square Layer Normalization, section 6",
    published="comparable quality",
    tolerance=f"mean validation losses differ by less than 0.05 nats/token over {len(SEEDS)} seeds",
    minutes=1,
    measure=measure,
)
