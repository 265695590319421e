"""Muon gets as far as AdamW in three quarters of the steps.

Question   how many steps less than AdamW does Muon need for the same loss, both at their best rate?
Command    GPTJAX_DATA=FOLDER gptjax repro muon
           GPTJAX_DATA=FOLDER gptjax train experiments/papers/muon.py (one run with Muon)
Cost       5 minutes on 2 CPU cores
Expected   Muon's best run of 600 steps ends below AdamW's best of 800
Source     Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (a blog post)

Each run has a schedule of its own, which ends at 0 with its last step, so that no one is read off in mid-flight. Both
optimisers choose among four rates, a factor of 2 apart; everything else is equal.
"""

from pathlib import Path

from experiments.papers.nanogpt_shakespeare_cpu import experiment as shakespeare
from gptjax.lab.repro import Claim, Measurement, train_run

experiment = shakespeare.override(
    name="muon",
    model=dict(num_layers=3, embed_dim=96, num_heads=3),
    optim=dict(name="muon", learning_rate=1.6e-2, final_learning_rate=0.0, warmup_steps=50, beta1=0.95),
    train=dict(steps=600, eval_every=0, checkpoint_every=400, sample_tokens=0),
)
STEPS = {"adamw": 800, "muon": 600}
MOMENTUM = {"adamw": 0.9, "muon": 0.95}  # the usual one of each
RATES = {"adamw": (4e-3, 8e-3, 1.6e-2, 3.2e-2), "muon": (4e-3, 8e-3, 1.6e-2, 3.2e-2)}


def tuned(folder: Path, name: str) -> dict[str, float]:
    """The final validation loss at every rate."""
    losses = {}
    for rate in RATES[name]:
        changes = {"optim.name": name, "optim.learning_rate": rate, "optim.beta1": MOMENTUM[name]}
        run = experiment.override({"name": f"{name}-{rate:g}", "train.steps": STEPS[name]} | changes)
        losses[f"{rate:g}"] = train_run(run, folder)["val_loss"]
    return losses


def measure(folder: Path) -> Measurement:
    losses = {name: tuned(folder, name) for name in STEPS}
    best = {name: min(by_rate, key=lambda rate: by_rate[rate]) for name, by_rate in losses.items()}
    adamw, muon = (losses[name][best[name]] for name in STEPS)
    inside = all(best[name] not in (f"{RATES[name][0]:g}", f"{RATES[name][-1]:g}") for name in STEPS)
    return Measurement(
        ours=f"{muon:.4f} after {STEPS['muon']} steps of Muon, {adamw:.4f} after {STEPS['adamw']} of AdamW",
        passed=muon <= adamw and inside,
        metrics={f"{name}, val_loss by rate": by_rate for name, by_rate in losses.items()} | {"best rate": best},
        note=f"The best rates are {best['adamw']} for AdamW and {best['muon']} for Muon, "
        + ("both inside what was tried." if inside else "one of them at the edge of what was tried: not tuned."),
    )


claim = Claim(
    title="Muon needs three quarters of AdamW's steps for the same loss",
    citation="Jordan et al. 2024, Muon: an optimizer for hidden layers (kellerjordan.github.io/posts/muon)",
    published="1.35 times as fast as AdamW to the same loss: 0.74 of the steps",
    tolerance="Muon in 0.75 of the steps ends at AdamW's loss or below; both best rates inside the rates tried",
    minutes=5,
    measure=measure,
)
