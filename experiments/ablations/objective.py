"""Causal against masked: what does a model learn from the same text, tokens and steps by either objective?

Question   which of the two (a) recalls better over long distances, to beyond the training length, (b) fills in hidden
           tokens better, (c) is the better start for telling sentiment?
Command    GPTJAX_DATA=FOLDER python experiments/ablations/objective.py --seeds 3 [--folder runs/objective]
Cost       40 minutes on 2 CPU cores that others use as well; the same command goes on where it was stopped
Expected   see experiments/README.md

Shape, text, batches, steps and so FLOPs are equal; answers are not: a causal model is asked for every token that it
reads, a masked one for 15% of them, as BERT was. That is a part of what is compared.
(a) A text made for it, see probing/recall.py. The question ends the text: a causal model tells the next token, a masked
    one what a last mask stands for. An answer is one token, so that no mask leaves a part of it to be seen.
(b) Film sentences of the task's training side; the gaps are in those of its test side, see probing/cloze.py.
(c) The models of (b) with a new head that reads their last token, all weights trained on.
Both objectives have the same questions; those of (a) and (b), like the batches, are others for every seed.
`gptjax train` of this file is one run of (b), once the study has written its text.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gptjax.atomic_io import read_json, write_atomic
from gptjax.commands import start_jax
from gptjax.config import DataConfig, Experiment, ModelConfig, OptimConfig, TrainConfig
from gptjax.data.examples import load_examples
from gptjax.data.tasks import find_task
from gptjax.errors import GptjaxError
from gptjax.inference.pretrained import Pretrained
from gptjax.interop.open import open_model
from gptjax.lab.report import plot_by_distance
from gptjax.probing.cloze import make_cloze_items, predict_bidirectional, predict_left_to_right
from gptjax.probing.recall import CHANCE, document, recall
from gptjax.training.train import train
from gptjax.tuning.intervals import over_runs
from gptjax.tuning.tasks import evaluate_task

experiment = Experiment(
    name="objective",
    model=ModelConfig(
        context_length=128,
        num_layers=2,
        embed_dim=64,
        num_heads=4,
        positions="rope",
        norm="rmsnorm",
        bias=False,
        init_std=0.05,
        layers="unrolled",
    ),
    data=DataConfig(
        source="runs/objective/sentences/train.jsonl",
        val_source="runs/objective/sentences/validation.jsonl",
        tokenizer="sentencepiece",
        tokenizer_vocab_size=1024,
        document_mask=True,
    ),
    optim=OptimConfig(learning_rate=5e-3, warmup_steps=100, beta2=0.95),
    train=TrainConfig(steps=1200, batch_size=8, eval_every=0, checkpoint_every=0, log_every=100, sample_tokens=0),
)
OBJECTIVES = {"causal": {}, "masked": {"objective.name": "mlm", "model.causal": False}}
RECALL = {
    "model.context_length": 64,
    "data.tokenizer": "char",
    "train.steps": 600,
    "train.batch_size": 32,
}
SENTIMENT = {
    "data.source": "task:sentiment",
    "data.val_source": None,
    "data.tokenizer": "init",
    "data.document_mask": False,
    "data.answers": "classes",
    "objective.name": "sft",
    "model.dropout": 0.1,
    "optim.learning_rate": 1e-3,
    "train.steps": 400,
}
PAIRS, DOCUMENTS = 256, 2600  # of recall's text: pairs in a document, and how many there are to learn from
DISTANCES = (2, 4, 8, 16, 32, 62, 80, 96, 128, 192, 256)
QUESTIONS, GAPS, CANDIDATES = 300, 300, 32  # for a model: at each distance, in sentences, and by Bayes' rule in each


def write_texts(folder: Path) -> None:
    """The text of (a), and that of (b) and (c): the same bytes every time."""
    made = {"train": range(DOCUMENTS), "validation": range(DOCUMENTS, DOCUMENTS + 40)}
    for side, numbers in made.items():
        sentences = (example.values["sentence"] for example in load_examples("task:sentiment", DataConfig(), side))
        for part, texts in {"recall": (document(0, i, PAIRS) for i in numbers), "sentences": sentences}.items():
            path = folder / part / f"{side}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def plan(folder: Path, part: str, objective: str, seed: int) -> Experiment:
    """One run of the study."""
    text = {"data.source": folder / part / "train.jsonl", "data.val_source": folder / part / "validation.jsonl"}
    run = experiment.override({name: str(path) for name, path in text.items()} | OBJECTIVES[objective])
    if part == "recall":
        run = run.override(RECALL)
    if part == "sentiment":
        run = run.override({"init": str(folder / f"sentences-{objective}-{seed}")} | SENTIMENT)
    return run.override(name=f"{part}-{objective}-{seed}", seed=seed)


def recalled(model: Pretrained, seed: int) -> dict[str, float]:
    """(a)"""
    right = recall(model, DISTANCES, QUESTIONS, RECALL["model.context_length"], seed)
    return {f"recall at {d}": float(row.mean()) for d, row in zip(DISTANCES, right, strict=True)}


def filled_in(model: Pretrained, seed: int) -> dict[str, float]:
    """(b)"""
    tokens = model.tokenizer
    texts = (
        tokens.encode(example.values["sentence"]) for example in load_examples("task:sentiment", DataConfig(), "test")
    )
    gaps = make_cloze_items(
        (np.append(ids, tokens.eos_id) for ids in texts), GAPS, model.model.context_length, tokens, seed
    )
    truth = [gap.target for gap in gaps]
    told = {
        "left": predict_left_to_right(model, gaps),
        "both sides": predict_bidirectional(model, gaps, candidates=CANDIDATES),
    }
    return {f"fill-in from {side}": float((answers == truth).mean()) for side, answers in told.items()}


def told(model: Pretrained, seed: int) -> dict[str, float]:
    """(c)"""
    figures, _ = evaluate_task(model, find_task("sentiment"))
    return {"sentiment": figures["accuracy"], "sentiment above the majority": figures["accuracy_difference"]}


PARTS = {"recall": recalled, "sentences": filled_in, "sentiment": told}


def measured(folder: Path, part: str, objective: str, seed: int) -> dict[str, float]:
    """The figures of one run: trained, or gone on with, and measured now; or read, if that was done before."""
    run = plan(folder, part, objective, seed)
    path = folder / f"{run.name}.json"
    if not path.exists():
        train(run, folder / run.name)
        figures = PARTS[part](open_model(str(folder / run.name)), seed)
        write_atomic(path, json.dumps(figures, indent=2) + "\n")
    return read_json(path)


def study(folder: Path, seeds: int) -> None:
    """Trains and measures what is missing, prints the table, and keeps it with a picture in `folder`."""
    write_texts(folder)
    figures: dict[str, dict[str, list[float]]] = {}  # measure -> objective -> one value a seed
    for part, seed, objective in itertools.product(PARTS, range(seeds), OBJECTIVES):
        for name, value in measured(folder, part, objective, seed).items():
            figures.setdefault(name, {}).setdefault(objective, []).append(value)
    table = {name: summary(name, **values) for name, values in figures.items()}
    result = {"seeds": seeds, "figures": figures, "table": table}
    write_atomic(folder / "result.json", json.dumps(result, indent=2) + "\n")
    curves = {o: np.array([table[f"recall at {d}"][o] for d in DISTANCES]).T for o in OBJECTIVES}
    plot_by_distance(DISTANCES, curves, RECALL["model.context_length"], CHANCE, folder / "recall.png")
    print(f"means of {seeds} seeds with 95% intervals (Student's t)")
    rows = [("", *OBJECTIVES, "masked - causal")]
    rows += [(name, *map(shown, columns.values())) for name, columns in table.items()]
    for name, *cells in rows:
        print(f"{name:<30}" + "".join(f"{cell:>26}" for cell in cells))


def summary(name: str, causal: Sequence[float], masked: Sequence[float]) -> dict[str, tuple[float, float, float]]:
    """Mean, low and high of each objective, and of the difference of runs with the same seed."""
    columns = {"causal": causal, "masked": masked, "difference": np.subtract(masked, causal)}
    scores = {column: over_runs(name, values) for column, values in columns.items()}
    return {column: (score.value, score.low, score.high) for column, score in scores.items()}


def shown(interval: tuple[float, float, float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*interval)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/objective"))
    options = parser.parse_args()
    start_jax()
    try:
        study(options.folder, options.seeds)
    except GptjaxError as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
