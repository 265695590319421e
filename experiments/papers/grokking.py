"""A small model learns half of a table by heart, and understands it much later: if its weights decay.

Question   when does a model tell the sums mod 97 that it has not seen, and does it without weight decay?
Command    gptjax repro grokking
           gptjax train experiments/papers/grokking.py (the run with decay)
Cost       8 minutes on 2 CPU cores
Expected   99% of the unseen half at three times the steps that the seen half took, or later; without decay below 50%
Source     Power et al. 2022, "Grokking: Generalization Beyond Overfitting on Small Algorithmic Datasets", section 3

The setting of the paper's appendix A.1.2: two layers of width 128, AdamW with a rate of 1e-3, decay 1, betas 0.9 and
0.98, batches of 512, ten steps of warm-up. The sum is told by a head on the last token, as one of 97 classes, so that
validation counts right answers on the way; every number is a symbol of its own. Weights begin large (deviation
0.1): from small ones, at 0.02, decay leaves the model no time to learn by heart, and both halves are known at step 300.
"""

from pathlib import Path

import numpy as np

from gptjax.config import DataConfig, Experiment, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from gptjax.data.windows import permute
from gptjax.lab.repro import Claim, Measurement, train_run
from gptjax.training.run import open_run

MODULUS, KNOWN, TIMES, BELOW = 97, 0.99, 3.0, 0.5
SYMBOLS = [chr(0x4E00 + i) for i in range(MODULUS)]


def document(seed: int, index: int) -> dict[str, str]:
    """One of all sums of two numbers, in random order."""
    a, b = divmod(int(permute(np.array([index]), MODULUS**2, (seed,))[0]), MODULUS)
    return {"a": SYMBOLS[a], "b": SYMBOLS[b], "sum": SYMBOLS[(a + b) % MODULUS]}


experiment = Experiment(
    name="grokking",
    model=ModelConfig(context_length=4, num_layers=2, embed_dim=128, num_heads=4, init_std=0.1, layers="unrolled"),
    data=DataConfig(
        source="function:experiments.papers.grokking:document",
        prompt="{a}+{b}=",
        answer="{sum}",
        answers="classes",
        labels=tuple(SYMBOLS),
        max_documents=MODULUS**2,
        val_fraction=0.5,
        tokenizer="char",
    ),
    objective=ObjectiveConfig(name="sft"),
    optim=OptimConfig(schedule="constant", warmup_steps=10, beta2=0.98, weight_decay=1.0, clip_norm=None),
    train=TrainConfig(steps=3000, batch_size=512, eval_every=50, checkpoint_every=1000, keep_best=0, sample_tokens=0),
)


def first_at(folder: Path, name: str, least: float) -> int | None:
    """The first step at which an accuracy, of the last evaluation or the mean of five logged ones, is as high."""
    lines = [(line["step"], line[name]) for line in open_run(folder).metrics() if name in line]
    steps, values = np.array(lines).T
    if not name.startswith("val_"):
        steps, values = steps[4:], np.convolve(values, np.ones(5) / 5, "valid")
    reached = values >= least
    return int(steps[reached.argmax()]) if reached.any() else None


def measure(folder: Path) -> Measurement:
    train_run(experiment, folder)
    seen, unseen = (first_at(folder / experiment.name, name, KNOWN) for name in ("accuracy", "val_accuracy"))
    if seen is None or unseen is None:
        return Measurement(f"{KNOWN:.0%} not reached in {experiment.train.steps} steps", False)
    without = experiment.override({"name": "no-decay", "optim.weight_decay": 0.0, "train.steps": unseen})
    still = train_run(without, folder)["val_accuracy"]
    return Measurement(
        ours=f"{KNOWN:.0%} of the seen half at step {seen}, of the unseen at {unseen}; without decay then {still:.0%}",
        passed=unseen >= TIMES * seen and still < BELOW,
        metrics={"seen half, step": seen, "unseen half, step": unseen, "unseen without decay": still},
        note=f"{unseen / seen:.1f} times the steps.",
    )


claim = Claim(
    title="A model generalises long after it knows its training half by heart, if its weights decay",
    citation="Power et al. 2022, Grokking (arXiv:2201.02177), sections 3 and A.1.2, figures 1 and 2",
    published="validation accuracy rises to 100% long after training accuracy does; weight decay speeds it up",
    tolerance=f"unseen half {KNOWN:.0%} at >= {TIMES:g} times the step of the seen half; no decay < {BELOW:.0%} then",
    minutes=8,
    measure=measure,
)
