"""Addition is learnt from fewer sums where answers are written from the last digit to the first.

Question   of how many sums that were not read does a small model tell the answer, having read 1,200 of a million?
Command    gptjax repro reversed_addition
           gptjax train experiments/papers/reversed_addition.py (one run with reversed answers)
Cost       5 minutes on 2 CPU cores
Expected   at least 99% where answers are reversed, at least 5 points fewer where they are plain
Source     Lee et al. 2023, "Teaching Arithmetic to Small Transformers", section 4, figure on sample efficiency

A carry goes from the last digit to the first: written in that order, each digit follows from two digits and a carry;
in the other, the first digit may depend on all six. The two kinds of run differ in that order alone. Numbers are filled
up with zeros and only answers are learnt, which is much easier than the paper's stream of sums: with 10,000 sums, as
there, both orders are learnt here (experiments/README.md), so that fewer are read. Measured are sums that no run has
read, written greedily and right in all digits.
"""

from pathlib import Path

import numpy as np

from gptjax.config import Data, Experiment, Model, Objective, Optim, Train
from gptjax.data.windows import permute
from gptjax.inference.rules import Sampling
from gptjax.inference.writer import Writer
from gptjax.lab.repro import Claim, Measured, trained
from gptjax.training.run import open_run
from gptjax.training.workshop import open_trained

BELOW, READ, ASKED, SEEDS = 1000, 1_200, 1_000, (0, 1, 2)
ORDERS = ("reversed", "plain")
LEAST, GAP = 0.99, 0.05  # share of reversed answers that are right; by how much fewer plain ones are


def document(seed: int, index: int) -> dict[str, str]:
    """A sum of two numbers below 1,000, no pair twice; its answer as it is written, and from its last digit on."""
    a, b = divmod(int(permute(np.array([index]), BELOW * BELOW, (seed,))[0]), BELOW)
    answer = f"{a + b:04}"
    return {"sum": f"{a:03}+{b:03}=", "plain": answer, "reversed": answer[::-1]}


experiment = Experiment(
    name="reversed_addition",
    model=Model(context_length=12, num_layers=4, embed_dim=96, num_heads=4, norm="rmsnorm", bias=False),
    data=Data(
        source="function:experiments.papers.reversed_addition:document",
        prompt="{sum}",
        answer="{reversed}",
        max_documents=READ,
        val_fraction=0.02,
        tokenizer="char",
    ),
    objective=Objective(name="supervised"),
    optim=Optim(learning_rate=2e-3, warmup_steps=100, beta2=0.98),
    train=Train(steps=1000, batch_size=128, eval_every=0, checkpoint_every=500, sample_tokens=0),
)


def right(folder: Path, order: str, seed: int) -> float:
    """The share of sums, none of which was read, that are answered as they should be."""
    writer = Writer(open_trained(open_run(folder)))
    asked = [document(seed, READ + index) for index in range(ASKED)]
    written = writer.complete([writer.tokenizer.encode(x["sum"]) for x in asked], 4, Sampling(0.0))
    return float(np.mean([made.text == x[order] for made, x in zip(written, asked, strict=True)]))


def percents(shares: list[float]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)


def measure(folder: Path) -> Measured:
    shares: dict[str, list[float]] = {order: [] for order in ORDERS}
    for seed in SEEDS:
        for order in ORDERS:
            source = f"{experiment.data.source}:{seed}"
            run = experiment.override({"data.source": source, "data.answer": f"{{{order}}}"})
            run = run.override(name=f"{order}-{seed}", seed=seed)
            trained(run, folder)
            shares[order].append(right(folder / run.name, order, seed))
    reverse, plain = (float(np.mean(shares[order])) for order in ORDERS)
    return Measured(
        ours=f"{reverse:.1%} reversed, {plain:.1%} plain, from {READ:,} sums",
        passed=reverse >= LEAST and reverse - plain >= GAP,
        figures={f"right by seed, {order}": values for order, values in shares.items()},
        seen=f"Of {ASKED:,} sums that were not read, by seed: reversed {percents(shares['reversed'])}; "
        f"plain {percents(shares['plain'])}.",
    )


claim = Claim(
    title="Addition is learnt from fewer sums where answers are written from the last digit to the first",
    citation="Lee et al. 2023, Teaching Arithmetic to Small Transformers (arXiv:2307.03381), section 4",
    published="reversed answers are learnt nearly perfectly from a few thousand sums, plain ones not even from 10,000",
    tolerance=f"mean of {len(SEEDS)} seeds: reversed >= {LEAST:.0%} right, plain at least {GAP * 100:.0f} points fewer",
    minutes=5,
    measure=measure,
)
