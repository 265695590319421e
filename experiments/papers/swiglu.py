"""A gate in the FFN is better than none, at equal parameters.

Question   does SwiGLU reach a lower loss than GELU with the same number of weights, data and steps?
Command    GPTJAX_DATA=FOLDER gptjax repro swiglu
           GPTJAX_DATA=FOLDER gptjax train experiments/papers/swiglu.py (one run with SwiGLU)
Cost       5 minutes on 2 CPU cores
Expected   a validation loss lower by at least 0.01 nats a character, in every one of three seeds
Source     Shazeer 2020, "GLU Variants Improve Transformer", table 1: log-perplexity 1.944 against 1.983 for GELU

Runs of one seed share data and its order; the interval is that of the paired differences, by Student's t. GELU's two
matrices have a hidden width of 384 and the gate's three one of 256: exactly as many weights.
"""

from pathlib import Path

from experiments.papers.nanogpt_shakespeare_cpu import experiment as shakespeare
from gptjax.lab.repro import Claim, Measurement, train_run
from gptjax.model.size import num_params
from gptjax.tuning.intervals import over_runs

experiment = shakespeare.override(
    name="swiglu",
    model=dict(num_layers=3, embed_dim=96, num_heads=3, ffn="swiglu", ffn_dim=256),
    optim=dict(learning_rate=3e-3, final_learning_rate=3e-4),
    train=dict(steps=1000, eval_every=0, checkpoint_every=500, sample_tokens=0),
)
FFNS = {"gelu": {"model.ffn": "gelu", "model.ffn_dim": 384}, "swiglu": {}}
SEEDS, LEAST = (0, 1, 2), 0.01


def measure(folder: Path) -> Measurement:
    losses: dict[str, list[float]] = {name: [] for name in FFNS}
    for seed in SEEDS:
        for name, changes in FFNS.items():
            run = experiment.override({"name": f"{name}-{seed}", "seed": seed} | changes)
            losses[name].append(train_run(run, folder)["val_loss"])
    gains = [gelu - swiglu for gelu, swiglu in zip(losses["gelu"], losses["swiglu"], strict=True)]
    gain = over_runs("gain", gains)
    sizes = {name: num_params(experiment.override(c).resolved(65).model)["total"] for name, c in FFNS.items()}
    return Measurement(
        ours=f"{gain.value:.4f} nats lower ({gain.low:.4f} to {gain.high:.4f})",
        passed=gain.value >= LEAST and gain.low > 0,
        metrics={f"{name}, val_loss by seed": values for name, values in losses.items()}
        | {"gain by seed": gains, "weights": sizes},
        note=f"GELU {sum(losses['gelu']) / len(SEEDS):.4f} and SwiGLU {sum(losses['swiglu']) / len(SEEDS):.4f} nats a "
        f"character on average; {sizes['gelu']:,} and {sizes['swiglu']:,} weights.",
    )


claim = Claim(
    title="SwiGLU is better than GELU at equal parameters",
    citation="Shazeer 2020, GLU Variants Improve Transformer, table 1 (pre-training on C4, 524,288 steps)",
    published="log-perplexity 1.944 for SwiGLU, 1.983 for GELU: 0.039 lower",
    tolerance=f"at least {LEAST} nats lower over {len(SEEDS)} seeds, the paired 95% interval above 0",
    minutes=5,
    measure=measure,
)
