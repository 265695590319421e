"""A model remembers secrets that it read by chance, and the more often it read them the better.

Question   how exposed is a random number of six digits that stands in the training text 0, 1, 4, 16 or 64 times?
Command    GPTJAX_DATA=FOLDER gptjax repro canary
           gptjax train experiments/papers/canary.py (once the claim has written its text to runs/repro)
Cost       4 minutes on 2 CPU cores
Expected   exposure rises with the count; none is near 1.4 bits, 64 times at least 15 of 19.9
Source     Carlini et al. 2019, "The Secret Sharer", definition 5 and figures 3 and 6 (exposure by insertions)

Into the first 150,000 characters of Shakespeare ten lines of the form "Romeo 281265." are put, two names for each
count, at random places between lines. The model reads the text six times over; all million numbers are then ranked
after each name. Training with differential privacy, which the paper shows to prevent it, is not part of this claim.
"""

from pathlib import Path

import numpy as np

from experiments.papers.nanogpt_shakespeare_cpu import experiment as shakespeare
from gptjax.data import corpus
from gptjax.durable import write_durably
from gptjax.lab.repro import Claim, Measured, trained
from gptjax.probing.memorization import exposure, nats_of_all
from gptjax.training.run import open_run
from gptjax.training.workshop import open_trained

experiment = shakespeare.override(
    name="canary",
    model=dict(num_layers=2, embed_dim=96, num_heads=3),
    data=dict(source="runs/repro/canary/text.txt"),
    optim=dict(learning_rate=3e-3, final_learning_rate=3e-4),
    train=dict(steps=1200, eval_every=0, checkpoint_every=400, sample_tokens=0),
)
CHARACTERS, DIGITS = 150_000, 6
NAMES = {
    0: ("Ariel", "Bianca"),
    1: ("Cressida", "Duncan"),
    4: ("Edmund", "Feste"),
    16: ("Goneril", "Horatio"),
    64: ("Imogen", "Jessica"),
}
LEAST, NONE = 15.0, 5.0  # bits: of what stands there 64 times at least, of what does not at most


def secrets() -> dict[str, int]:
    """The number of every name."""
    rng = np.random.default_rng(2019)
    return {name: int(rng.integers(10**DIGITS)) for names in NAMES.values() for name in names}


def text_with_canaries() -> str:
    (whole,) = corpus.read(str(shakespeare.data.source), shakespeare.data)
    lines, rng = whole[:CHARACTERS].splitlines(), np.random.default_rng(1)
    for count, names in NAMES.items():
        for name in names:
            for _ in range(count):
                lines.insert(int(rng.integers(len(lines) * 9 // 10)), f"{name} {secrets()[name]:0{DIGITS}d}.")
    return "\n".join(lines) + "\n"


def measure(folder: Path) -> Measured:
    write_durably(folder / "text.txt", text_with_canaries())
    trained(experiment.override({"data.source": str(folder / "text.txt")}), folder)
    model = open_trained(open_run(folder / experiment.name))
    found = {
        count: [exposure(nats_of_all(model, f"\n{name} ", "0123456789", DIGITS), secrets()[name]) for name in names]
        for count, names in NAMES.items()
    }
    mean = {count: float(np.mean(values)) for count, values in found.items()}
    rises = all(mean[a] < mean[b] for a, b in ((1, 4), (4, 16), (16, 64)))
    return Measured(
        ours=", ".join(f"{mean[count]:.1f}" for count in NAMES) + " bits at 0, 1, 4, 16, 64 times",
        passed=rises and mean[64] >= LEAST and mean[0] <= NONE,
        figures={f"exposure, {count} times": values for count, values in found.items()},
        seen=f"A number that the model knows has {np.log2(10**DIGITS):.1f} bits, one that it has never seen 1.4 on "
        "average. Each figure is the mean of two numbers.",
    )


claim = Claim(
    title="The more often a secret stands in the training text, the more it is exposed",
    citation="Carlini et al. 2019, The Secret Sharer (USENIX Security), definition 5, figures 3 and 6",
    published="exposure rises with the number of insertions, up to complete memorisation",
    tolerance=f"rises over 1, 4, 16 and 64 times; none <= {NONE:g} bits, 64 times >= {LEAST:g} of 19.9",
    minutes=4,
    measure=measure,
)
