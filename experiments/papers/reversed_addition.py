"""Sums are learnt more easily when their digits are written from the last to the first.

Question   does a small model that has seen 10,000 sums learn addition better where the answer is reversed?
Command    gptjax repro reversed_addition
           gptjax train experiments/papers/reversed_addition.py (the run with reversed answers)
Cost       8 minutes on 2 CPU cores
Expected   of sums that were not seen at least 99% are right with reversed answers, and 5 points fewer with plain ones
Source     Lee et al. 2023, "Teaching Arithmetic to Small Transformers", section 4 and figure 3

The two runs differ in the order of the answers' digits alone. Only answers are learnt; the measure is the share of
2,000 sums, none of them seen in training, that are written wholly right, greedily.
"""

from pathlib import Path

import numpy as np

from gptjax.config import Data, Experiment, Model, Objective, Optim, Train
from gptjax.data.batches import permute
from gptjax.inference.rules import Sampling
from gptjax.inference.writer import Writer
from gptjax.lab.repro import Claim, Measured, trained
from gptjax.training.run import open_run
from gptjax.training.workshop import open_trained

BELOW, SEEN, ASKED = 1000, 10_000, 2_000
LEAST, GAP = 0.99, 0.05  # of reversed answers that are right; by how much fewer plain ones are


def document(seed: int, index: int) -> dict[str, str]:
    """A sum of two numbers below 1,000, no pair twice."""
    a, b = divmod(int(permute(np.array([index]), BELOW * BELOW, (seed,))[0]), BELOW)
    return {"sum": f"{a}+{b}=", "plain": str(a + b), "reversed": str(a + b)[::-1]}


experiment = Experiment(
    name="reversed",
    model=Model(context_length=16, num_layers=4, embed_dim=96, num_heads=4, norm="rmsnorm", bias=False),
    data=Data(
        source="function:experiments.papers.reversed_addition:document",
        prompt="{sum}",
        answer="{reversed}",
        max_documents=SEEN,
        val_fraction=0.02,
        tokenizer="char",
    ),
    objective=Objective(name="supervised"),
    optim=Optim(learning_rate=2e-3, warmup_steps=100, beta2=0.98),
    train=Train(steps=1500, batch_size=128, eval_every=500, checkpoint_every=1000, sample_tokens=0),
)
PLAIN = {"name": "plain", "data.answer": "{plain}"}


def right(folder: Path, answer: str) -> float:
    """The share of sums that were not seen and are written as they should be."""
    writer = Writer(open_trained(open_run(folder)))
    asked = [document(0, SEEN + index) for index in range(ASKED)]
    written = writer.complete([writer.tokenizer.encode(sums["sum"]) for sums in asked], 6, Sampling(0.0))
    return float(np.mean([made.text == sums[answer] for made, sums in zip(written, asked, strict=True)]))


def measure(folder: Path) -> Measured:
    shares = {}
    for run in (experiment, experiment.override(PLAIN)):
        trained(run, folder)
        shares[run.name] = right(folder / run.name, run.name)
    gap = shares["reversed"] - shares["plain"]
    return Measured(
        ours=f"{shares['reversed']:.1%} reversed, {shares['plain']:.1%} plain",
        passed=shares["reversed"] >= LEAST and gap >= GAP,
        figures={f"right, {name}": share for name, share in shares.items()},
        seen=f"{gap:+.1%} by the order of the digits, of {ASKED:,} sums that were not seen.",
    )


claim = Claim(
    title="Addition is learnt from 10,000 sums if the answer is written from its last digit, and less well otherwise",
    citation="Lee et al. 2023, Teaching Arithmetic to Small Transformers (arXiv:2307.03381), section 4",
    published="reversed answers reach nearly 100% where plain ones stay clearly below",
    tolerance=f"reversed >= {LEAST:.0%} right, plain at least {GAP * 100:.0f} points fewer",
    minutes=8,
    measure=measure,
)
