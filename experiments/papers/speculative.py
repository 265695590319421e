"""A small model drafts for a large one: more tokens a call, and the very same texts.

Question   are as many tokens made for each call of the large model as the paper's formula says, with the same output?
Command    GPTJAX_DATA=FOLDER gptjax repro speculative
           GPTJAX_DATA=FOLDER gptjax train experiments/papers/speculative.py (the large model)
Cost       6 minutes on 2 CPU cores
Expected   (1 - alpha^5) / (1 - alpha) tokens a call within 3%; greedy texts equal; drawn ones equally distributed
Source     Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", equation 1, appendix A.1

alpha is the measured share of guesses that are accepted, of those that are looked at. The distribution is tested by
chi-square on the second and third character together, which are drawn after guesses, against the exact probabilities of
the large model: those of its logits, summed over every first character.
"""

from pathlib import Path

import numpy as np
from scipy import stats

from experiments.papers.nanogpt_shakespeare_cpu import experiment as shakespeare
from gptjax.data.store import open_store
from gptjax.inference.drafters import DraftModel
from gptjax.inference.generator import Generator
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.sampling import SamplingParams
from gptjax.inference.scoring import Scorer, ScoreRequest
from gptjax.inference.speculative import Tally
from gptjax.lab.repro import Claim, Measurement, train_run
from gptjax.model.size import num_params
from gptjax.training.restore import open_trained
from gptjax.training.run import open_run

experiment = shakespeare.override(
    name="speculative",
    model=dict(num_layers=4, embed_dim=96, num_heads=4, positions="rope"),
    optim=dict(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=50),
    train=dict(steps=500, eval_every=0, checkpoint_every=250, sample_tokens=0),
)
LARGE: dict[str, object] = {"name": "large"}
SMALL: dict[str, object] = {"name": "small", "model.num_layers": 2, "model.embed_dim": 64}
GUESSES, PROMPTS, LENGTH, DRAWN = 4, 64, 16, 8192
TOLERANCE, LEAST_P = 0.03, 0.01


def prompts(count: int) -> list[np.ndarray]:
    """Pieces of the validation text."""
    ids = open_store(experiment.data).validation[0].ids
    starts = np.random.default_rng(0).integers(len(ids) - LENGTH, size=count)
    return [np.asarray(ids[start : start + LENGTH]).astype(np.int32) for start in starts]


def same_greedy_texts(large: Generator, small: Generator) -> float:
    """The share of prompts that are continued the same way with guesses and without."""
    given = prompts(PROMPTS)
    plain, guessed = (
        large.generate(given, 48, SamplingParams(0.0), drafter=drafter) for drafter in (None, DraftModel(small.engine))
    )
    return float(np.mean([np.array_equal(a.ids, b.ids) for a, b in zip(plain, guessed, strict=True)]))


def exact(model: Pretrained, prompt: np.ndarray) -> np.ndarray:
    """The probability of every pair of a second and a third character: float64 [vocab, vocab]."""
    size = model.tokenizer.vocab_size
    pairs = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1).reshape(-1, 2)
    scorer = Scorer(model, batch_size=64)

    def follow(texts: np.ndarray) -> np.ndarray:
        """Of every character after every text, [texts, vocab]."""
        whole = (np.concatenate([prompt, text, [c]]).astype(np.int32) for text in texts for c in range(size))
        nll = np.concatenate([scores.nll for scores in scorer.score_batch(ScoreRequest(ids, 1) for ids in whole)])
        return np.exp(-nll.astype(np.float64)).reshape(len(texts), size)

    first = follow(np.zeros((1, 0), np.int32))[0]
    second = follow(np.arange(size)[:, None])
    third = follow(pairs).reshape(size, size, size)
    return np.einsum("a,ab,abc->bc", first, second, third)


def chi_square(large: Generator, small: Generator) -> tuple[float, float, int]:
    """Statistic, p-value and degrees of freedom of drawn pairs; pairs expected less than 5 times are taken together."""
    prompt = prompts(1)[0]
    drawn = large.generate([prompt], 3, SamplingParams(1.0), count=DRAWN, drafter=DraftModel(small.engine))
    counts = np.zeros((large.tokenizer.vocab_size,) * 2)
    for completion in drawn:
        counts[completion.ids[1], completion.ids[2]] += 1
    wanted = exact(large.pretrained, prompt)
    wanted *= DRAWN / wanted.sum()
    often = wanted >= 5
    seen = np.append(counts[often], counts[~often].sum())
    expected = np.append(wanted[often], wanted[~often].sum())
    statistic, p = stats.chisquare(seen, expected)
    return float(statistic), float(p), len(seen) - 1


def measure(folder: Path) -> Measurement:
    models = []
    for run in (experiment.override(LARGE), experiment.override(SMALL)):
        train_run(run, folder)
        models.append(open_trained(open_run(folder / run.name)))
    large, small = map(Generator, models)
    tally = Tally(GUESSES)
    large.generate(prompts(PROMPTS), 48, SamplingParams(1.0), drafter=DraftModel(small.engine), tally=tally)
    off = tally.tokens_per_call / tally.expected_tokens_per_call - 1
    same = same_greedy_texts(large, small)
    statistic, p, degrees = chi_square(large, small)
    sizes = [num_params(model.model)["total"] for model in models]
    return Measurement(
        ours=f"{tally.tokens_per_call:.3f} tokens a call, formula {tally.expected_tokens_per_call:.3f} ({off:+.1%})",
        passed=abs(off) <= TOLERANCE and same == 1 and p > LEAST_P,
        metrics={"tokens a call": tally.tokens_per_call, "by the formula": tally.expected_tokens_per_call}
        | {"alpha": tally.acceptance, "guesses a call": GUESSES, "calls": tally.calls, "weights": sizes}
        | {"greedy texts that are equal": same, "chi-square": statistic, "degrees": degrees, "p": p},
        note=f"alpha is {tally.acceptance:.3f}; {same:.0%} of {PROMPTS} greedy texts are equal; chi-square "
        f"{statistic:.1f} with {degrees} degrees of freedom, p = {p:.3f}. Weights: {sizes[0]:,} and {sizes[1]:,}.",
    )


claim = Claim(
    title="Speculative decoding makes as many tokens a call as its formula says, and the same texts",
    citation="Leviathan, Kalman and Matias 2023, Fast Inference from Transformers via Speculative Decoding, eq. 1",
    published="(1 - alpha^(gamma + 1)) / (1 - alpha) tokens a call; the output distribution is unchanged",
    tolerance=f"tokens a call within {TOLERANCE:.0%}; greedy texts identical; chi-square p > {LEAST_P}",
    minutes=6,
    measure=measure,
)
