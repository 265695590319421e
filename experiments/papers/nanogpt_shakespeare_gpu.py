"""nanoGPT's recipe for a GPU: a character model of Shakespeare, 10.7 M parameters.

Question   does gptjax reach nanoGPT's published best loss, and as early, with nanoGPT's settings?
Command    GPTJAX_DATA=FOLDER gptjax repro nanogpt_shakespeare_gpu
           GPTJAX_DATA=FOLDER gptjax train experiments/papers/nanogpt_shakespeare_gpu.py
Cost       a few minutes on one GPU; not run yet
Expected   the best validation loss is 1.47 +- 0.02 nats a character, between steps 1,500 and 2,500
Source     github.com/karpathy/nanoGPT, README, "quick start": best validation loss 1.4697
"""

from pathlib import Path

from experiments.papers.nanogpt_shakespeare_cpu import experiment as on_cpu
from gptjax.lab.repro import Claim, Measurement, train_run
from gptjax.training.run import open_run

experiment = on_cpu.override(
    name="nanogpt_shakespeare_gpu",
    model=dict(
        context_length=256, num_layers=6, embed_dim=384, num_heads=6, dropout=0.2, dtype="bfloat16", layers="scan"
    ),
    train=dict(steps=5000, batch_size=64, eval_every=250, checkpoint_every=1000),
)
PUBLISHED, TOLERANCE, REACHED = 1.4697, 0.02, (1500, 2500)


def measure(folder: Path) -> Measurement:
    train_run(experiment, folder)
    looks = [(x["val_loss"], x["step"]) for x in open_run(folder / experiment.name).metrics() if "val_loss" in x]
    loss, step = min(looks)
    return Measurement(
        ours=f"{loss:.4f} nats a character at step {step:,}",
        passed=abs(loss - PUBLISHED) <= TOLERANCE and REACHED[0] <= step <= REACHED[1],
        metrics={"best val_loss": loss, "its step": step, "val_loss by step": {str(s): x for x, s in looks}},
        note=f"After the last step it is {looks[-1][0]:.4f}.",
    )


claim = Claim(
    title="nanoGPT's GPU recipe reaches its published best loss on Shakespeare",
    citation="Karpathy, nanoGPT (2022), README, section 'quick start' (shakespeare_char on a GPU)",
    published=f"best validation loss {PUBLISHED} nats a character",
    tolerance=f"best {PUBLISHED} +- {TOLERANCE} over the whole split, between steps {REACHED[0]:,} and {REACHED[1]:,}",
    minutes=4,
    measure=measure,
    device="gpu",
)
