"""Predictable scaling: the loss of a run is known before it begins, from runs of a hundredth of its compute and more.

Question   does L(C) = a C^b + c, fitted to small runs, tell the loss of a run with over 100 times the compute of the
           smallest, and 3.7 times that of the largest of them, within 2%?
Command    GPTJAX_DATA=FOLDER gptjax repro predictable_scaling
           GPTJAX_DATA=FOLDER gptjax scale experiments/papers/predictable_scaling.py --seeds 3 --workers 2
           GPTJAX_DATA=FOLDER gptjax train experiments/papers/predictable_scaling.py (the large run alone)
Cost       12 minutes on 2 CPU cores
Expected   a relative error of at most 2%; earlier families, of four heads at every width, missed it by 1.3, 0.9 and
           0.2 points (experiments/README.md)
Source     OpenAI 2023, GPT-4 Technical Report, section 3.1: L(C) = a C^b + c

The runs are of one form: heads are 8 wide at every width, and tokens grow with the square of the width, as parameters
do, so that C grows nearly as width^4. The peak of the learning rate falls as 1 / width; it was tuned at widths 32 and
56 only. The large run reads the text 2.4 times, the small ones 0.2 to 1.2 times.
"""

from collections.abc import Sequence
from pathlib import Path

from gptjax.config import DataConfig, Experiment, ModelConfig, OptimConfig, TrainConfig
from gptjax.errors import TrainingFailed
from gptjax.lab import scaling
from gptjax.lab.live_table import LiveTable
from gptjax.lab.local import Local
from gptjax.lab.repro import Claim, Measurement
from gptjax.lab.sweep import FixedPlan, train_missing
from gptjax.lab.trials import Trial, write_sweep

LARGEST_ERROR, SEEDS = 0.02, 3


def of_width(width: int) -> Experiment:
    """Four blocks of a width, trained on 192 tokens for each of its squares."""
    steps = 3 * width**2 // 8
    return Experiment(
        name=f"width{width}",
        model=ModelConfig(
            context_length=64,
            num_layers=4,
            embed_dim=width,
            num_heads=width // 8,
            positions="rope",
            norm="rmsnorm",
            bias=False,
            layers="unrolled",
        ),
        data=DataConfig(source="$GPTJAX_DATA/tinyshakespeare.txt", tokenizer="char", val_fraction=0.1),
        optim=OptimConfig(learning_rate=0.64 / width, warmup_steps=steps // 10),
        train=TrainConfig(
            steps=steps, batch_size=8, eval_every=0, checkpoint_every=1000, keep_last=1, log_every=50, sample_tokens=0
        ),
    )


sweep = [of_width(width) for width in range(80, 31, -8)]  # the longest first, so that no worker waits for it
experiment = of_width(112).override(name="predictable_scaling", seed=1)


def measure(folder: Path) -> Measurement:
    study = scaling.study_of(sweep, experiment, SEEDS, folder)
    if scaling.read_prediction(study) is None:
        write_sweep(folder, study.trials)
        train_all(study.trials, workers=2)
        scaling.register(study)
    study.large.file.write_text(study.large.experiment.to_json(), encoding="utf-8")
    train_all([study.large], workers=1)
    s = scaling.score(study)
    return Measurement(
        ours=f"{s['predicted']:.4f} nats predicted, {s['loss']:.4f} reached: {s['relative_error']:+.2%}",
        passed=abs(s["relative_error"]) <= LARGEST_ERROR,
        metrics=s,
        note=f"{s['times_smallest']:.0f} times the compute of the smallest run, {s['times_largest']:.1f} times that of "
        f"the largest; registered {s['registered']}, begun {s['began']}.",
    )


def train_all(trials: Sequence[Trial], workers: int) -> None:
    with LiveTable() as show:
        states = train_missing(FixedPlan(trials), Local(workers), show)
    if failed := [name for name, state in states.items() if not state.done]:
        raise TrainingFailed(f"{failed[0]}: is not done; its log lies beside it")


claim = Claim(
    title="The loss of a large run is known before it begins",
    citation="OpenAI 2023, GPT-4 Technical Report, section 3.1, figure 1",
    published="predicted from runs with at most 1/10,000 of the compute, by L(C) = a C^b + c",
    tolerance=f"registered before a run with at least 100 times the compute of the smallest, and within "
    f"{LARGEST_ERROR:.0%} of its loss",
    minutes=12,
    measure=measure,
)
