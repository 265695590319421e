"""Addition is learnt from fewer sums where answers are written from the last digit to the first.

Question   how many of a million sums must a small model read to answer the others, and how many of them does it answer
           from as many where the order of the digits is the other?
Command    gptjax repro reversed_addition
           gptjax train experiments/papers/reversed_addition.py (one run with reversed answers)
Cost       about 6 minutes on 2 CPU cores, and 6 more for every number of sums that is not enough
Expected   with the fewest sums from which 99% of reversed answers are right, 5 points fewer of plain ones are
Source     Lee et al. 2023, "Teaching Arithmetic to Small Transformers", section 4, figure on sample efficiency

A carry goes from the last digit to the first: written in that order, each digit follows from two digits and a carry;
in the other, the first digit may depend on all six. The two kinds of run differ in that order alone. Numbers are filled
up with zeros and only answers are learnt, which is much easier than the paper's stream of sums: from 10,000 sums, as
there, both orders are learnt here (experiments/README.md). So, as in its figure, the number of sums is what is varied.
Measured are sums that no run has read, written greedily and right in all digits.
"""

from pathlib import Path

import numpy as np

from gptjax.config import DataConfig, Experiment, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from gptjax.data.windows import permute
from gptjax.inference.generator import Generator
from gptjax.inference.sampling import SamplingParams
from gptjax.lab.repro import Claim, Measurement, train_run
from gptjax.training.restore import open_trained
from gptjax.training.run import open_run

BELOW, ASKED, SEEDS = 1000, 1_000, (0, 1, 2)
READ = (800, 1_000, 1_200)  # sums: more and more, until reversed answers are learnt from them
ORDERS = ("reversed", "plain")
LEAST, GAP = 0.99, 0.05  # share of reversed answers that are right; by how much fewer plain ones are


def document(seed: int, index: int) -> dict[str, str]:
    """A sum of two numbers below 1,000, no pair twice; its answer as it is written, and from its last digit on."""
    a, b = divmod(int(permute(np.array([index]), BELOW * BELOW, (seed,))[0]), BELOW)
    answer = f"{a + b:04}"
    return {"sum": f"{a:03}+{b:03}=", "plain": answer, "reversed": answer[::-1]}


experiment = Experiment(
    name="reversed_addition",
    model=ModelConfig(context_length=12, num_layers=4, embed_dim=96, num_heads=4, norm="rmsnorm", bias=False),
    data=DataConfig(
        source="function:experiments.papers.reversed_addition:document",
        prompt="{sum}",
        answer="{reversed}",
        max_documents=READ[0],
        val_fraction=0.02,
        tokenizer="char",
    ),
    objective=ObjectiveConfig(name="sft"),
    optim=OptimConfig(learning_rate=2e-3, warmup_steps=100, beta2=0.98),
    train=TrainConfig(steps=1000, batch_size=128, eval_every=0, checkpoint_every=500, sample_tokens=0),
)


def right(folder: Path, order: str, seed: int) -> float:
    """The share of sums, none of which was read, that are answered as they should be."""
    writer = Generator(open_trained(open_run(folder)))
    asked = [document(seed, READ[-1] + index) for index in range(ASKED)]
    written = writer.generate([writer.tokenizer.encode(x["sum"]) for x in asked], 4, SamplingParams(0.0))
    return float(np.mean([made.text == x[order] for made, x in zip(written, asked, strict=True)]))


def shares(folder: Path, order: str, read: int) -> list[float]:
    """What is right after reading so many sums, for each seed, which is that of the model and of the sums."""
    found = []
    for seed in SEEDS:
        changes = {"data.source": f"{experiment.data.source}:{seed}", "data.answer": f"{{{order}}}"}
        name = f"{order}-{read}-{seed}"
        run = experiment.override(changes | {"name": name, "seed": seed, "data.max_documents": read})
        train_run(run, folder)
        found.append(right(folder / name, order, seed))
    return found


def measure(folder: Path) -> Measurement:
    found: dict[str, list[float]] = {}
    told = []
    for read in READ:
        by_order = {order: shares(folder, order, read) for order in ORDERS}
        found |= {f"right by seed, {order}, {read}": by_seed for order, by_seed in by_order.items()}
        reverse, plain = (float(np.mean(by_order[order])) for order in ORDERS)
        told.append(f"{read:,} sums: {reverse:.1%} and {plain:.1%}")
        if reverse >= LEAST:
            break
    return Measurement(
        ours=f"{reverse:.1%} reversed, {plain:.1%} plain, from {read:,} sums",
        passed=reverse >= LEAST and reverse - plain >= GAP,
        metrics=found,
        note=f"Of {ASKED:,} sums that were not read, reversed and plain, by {len(SEEDS)} seeds: {'; '.join(told)}.",
    )


claim = Claim(
    title="Addition is learnt from fewer sums where answers are written from the last digit to the first",
    citation="Lee et al. 2023, Teaching Arithmetic to Small Transformers (arXiv:2307.03381), section 4",
    published="reversed answers are learnt nearly perfectly from a few thousand sums, plain ones not even from 10,000",
    tolerance=f"{LEAST:.0%} of reversed right from {READ[0]:,} to {READ[-1]:,} sums; from the fewest of these "
    f"{GAP * 100:.0f} points fewer of plain ones, means of {len(SEEDS)} seeds",
    minutes=6,
    measure=measure,
)
