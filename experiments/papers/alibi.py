"""Train short, test long: ALiBi reads texts eight times as long as those of its training.

Question   what becomes of the loss beyond the training length, with ALiBi, RoPE and a table of learned positions?
Command    GPTJAX_DATA=FOLDER gptjax repro alibi
           GPTJAX_DATA=FOLDER gptjax train experiments/papers/alibi.py (the run with ALiBi)
Cost       5 minutes on 2 CPU cores
Expected   ALiBi is no worse at 512 tokens than at 64, RoPE is much worse, learned positions end at 64
Source     Press et al. 2022, "Train Short, Test Long", figure 1 and section 4.1

All of the validation text is read in windows of 64 to 512 tokens that do not overlap, as in the paper; a longer window
also means fewer tokens without anything to go by, so that a model that could use all of it would have a falling loss.
"""

from pathlib import Path

from experiments.papers.nanogpt_shakespeare_cpu import experiment as shakespeare
from gptjax.data.store import open_store
from gptjax.errors import PromptError
from gptjax.inference.scoring import Scorer
from gptjax.lab.repro import Claim, Measurement, train_run
from gptjax.training.restore import open_trained
from gptjax.training.run import open_run

experiment = shakespeare.override(
    name="alibi",
    model=dict(num_layers=3, embed_dim=96, num_heads=3, positions="alibi"),
    train=dict(steps=600, eval_every=0, checkpoint_every=300, sample_tokens=0),
)
KINDS, WINDOWS, TOLERANCE = ("alibi", "rope", "learned"), (64, 128, 256, 512), 0.05


def losses(folder: Path, kind: str) -> list[float | None]:
    """Nats a character of one kind of positions at every window; None where the model cannot read so many tokens."""
    run = experiment.override({"name": kind, "model.positions": kind})
    train_run(run, folder)
    scorer = Scorer(open_trained(open_run(folder / kind)))
    ids = open_store(experiment.data).validation[0].ids
    found: list[float | None] = []
    for window in WINDOWS:
        try:
            found.append(next(scorer.texts([ids], window=window)).loss)
        except PromptError:  # beyond a table of positions
            found.append(None)
    return found


def measure(folder: Path) -> Measurement:
    table = {kind: losses(folder, kind) for kind in KINDS}
    short, long = table["alibi"][0], table["alibi"][-1]
    assert short is not None and long is not None
    return Measurement(
        ours=f"{long - short:+.3f} nats from 64 to 512 tokens ({short:.3f} to {long:.3f})",
        passed=long <= short + TOLERANCE and table["learned"][-1] is None,
        metrics={f"{kind}, loss by window": values for kind, values in table.items()} | {"windows": list(WINDOWS)},
        note=f"RoPE goes from {table['rope'][0]:.3f} to {table['rope'][-1]:.3f}; the model with learned positions "
        f"({table['learned'][0]:.3f} at 64) has none beyond 64 and is refused longer texts.",
    )


claim = Claim(
    title="ALiBi, trained on 64 tokens, reads 512 without loss",
    citation="Press, Smith and Lewis 2022, Train Short, Test Long (ICLR), figure 1 and section 4.1",
    published="perplexity does not rise beyond the training length with ALiBi; it does with sinusoids and RoPE",
    tolerance=f"ALiBi's loss at 512 <= its loss at 64 + {TOLERANCE} nats; learned positions cannot read 512",
    minutes=5,
    measure=measure,
)
