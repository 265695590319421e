"""Induction heads need two layers of attention, and come all at once.

Question   can attention alone learn to go on with a sequence that it has seen once, in one layer and in two?
Command    gptjax repro induction
           gptjax train experiments/papers/induction.py (the run with two layers)
Cost       4 minutes on 2 CPU cores
Expected   two layers tell the repeated half to 0.1 nats a token, one layer is left above 1 nat; the loss falls abruptly
Source     Olsson et al. 2022, "In-context Learning and Induction Heads", arguments 1 and 2 (phase change, ablation)

A text is a random sequence of 8 to 23 different symbols, twice. Only the second half is learnt; its first symbol, which
nothing foretells, is left out of the loss that is measured, on fresh texts. Lengths differ, so that places alone do not
tell how far to look back: that takes one head that looks at the token before, and one that looks for its like.
"""

from pathlib import Path

import numpy as np

from gptjax.config import DataConfig, Experiment, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from gptjax.inference.scoring import Scorer, ScoreRequest
from gptjax.lab.repro import Claim, Measurement, train_run
from gptjax.training.restore import open_trained
from gptjax.training.run import open_run

SYMBOLS = [chr(33 + i) for i in range(64)]


def document(seed: int, index: int) -> dict[str, str]:
    """A random sequence, to be read and then to be said again."""
    rng = np.random.default_rng((seed, index))
    sequence = "".join(SYMBOLS[i] for i in rng.permutation(len(SYMBOLS))[: rng.integers(8, 24)])
    return {"first": sequence, "again": sequence}


experiment = Experiment(
    name="induction",
    model=ModelConfig(
        context_length=48,
        num_layers=2,
        embed_dim=64,
        num_heads=4,
        ffn="none",
        positions="rope",
        bias=False,
        init_std=0.05,
        layers="unrolled",
    ),
    data=DataConfig(
        source="function:experiments.papers.induction:document",
        prompt="{first}",
        answer="{again}",
        max_documents=30_000,
        val_fraction=0.01,
        tokenizer="char",
    ),
    objective=ObjectiveConfig(name="sft"),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=50, beta2=0.98, weight_decay=0.0),
    train=TrainConfig(steps=2000, batch_size=32, eval_every=0, checkpoint_every=1000, sample_tokens=0),
)
FRESH, MOST, LEAST, ABRUPT = 300, 0.1, 1.0, 0.1  # texts to measure on; nats; share of the steps


def second_half(folder: Path) -> float:
    """Nats of a symbol that stands a second time, after the first of the second half."""
    scorer = Scorer(open_trained(open_run(folder)))
    texts = (document(1, index)["first"] for index in range(FRESH))
    parts = [ScoreRequest(scorer.tokenizer.encode(text + text), len(text) - 1) for text in texts]
    return float(np.concatenate([scores.nll for scores in scorer.score_batch(parts)]).mean())


def curve(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the training loss, each the mean of the last five that were logged."""
    lines = [(x["step"], x["loss"]) for x in open_run(folder).metrics() if "loss" in x]
    steps, losses = np.array(lines).T
    return steps[4:], np.convolve(losses, np.ones(5) / 5, "valid")


def measure(folder: Path) -> Measurement:
    losses = {}
    for layers in (1, 2):
        train_run(experiment.override({"name": f"layers-{layers}", "model.num_layers": layers}), folder)
        losses[layers] = second_half(folder / f"layers-{layers}")
    above = curve(folder / "layers-1")[1][-1]
    steps, falling = curve(folder / "layers-2")
    way = [int(steps[(falling <= falling[-1] + share * (above - falling[-1])).argmax()]) for share in (0.75, 0.25)]
    sudden = (way[1] - way[0]) / experiment.train.steps
    return Measurement(
        ours=f"{losses[2]:.3f} nats with two layers, {losses[1]:.2f} with one",
        passed=losses[2] <= MOST and losses[1] >= LEAST and sudden <= ABRUPT,
        metrics={"second half, one layer": losses[1], "second half, two layers": losses[2]}
        | {"middle half of the fall, steps": way, "share of the run": sudden},
        note=f"The middle half of the fall, from what one layer ends at to what two do, took steps {way[0]} to "
        f"{way[1]} of {experiment.train.steps}: {sudden:.1%} of the run.",
    )


claim = Claim(
    title="Two layers of attention learn induction, abruptly; one layer cannot",
    citation="Olsson et al. 2022, In-context Learning and Induction Heads (Transformer Circuits), arguments 1 and 2",
    published="induction heads form in an abrupt phase change in models of two layers and more, not in one layer",
    tolerance=f"second half: two layers <= {MOST} nats, one >= {LEAST}; half the fall within {ABRUPT:.0%} of the run",
    minutes=4,
    measure=measure,
)
