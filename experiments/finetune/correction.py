"""Correction: typing errors are taken out of a line.

Question   does a model of 0.6 million parameters that reads bytes mend more than it breaks?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/finetune/correction.py
           GPTJAX_DATA=FOLDER gptjax eval runs/correction --tasks correction
Cost       7 minutes on 2 CPU cores
Expected   see experiments/README.md
"""

from gptjax.config import DataConfig, Experiment, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig

experiment = Experiment(
    name="correction",
    # from nothing: almost all of an answer is copied letter by letter, which pieces of words only hinder
    model=ModelConfig(
        context_length=320,  # three lines with their corrections
        num_layers=3,
        embed_dim=128,
        num_heads=4,
        positions="rope",
        norm="rmsnorm",
        bias=False,
        layers="unrolled",
    ),
    data=DataConfig(source="task:correction", tokenizer="byte"),
    objective=ObjectiveConfig(name="sft"),
    optim=OptimConfig(name="muon", learning_rate=3e-3, warmup_steps=50, beta2=0.95),
    train=TrainConfig(steps=2400, batch_size=4, eval_every=1200, checkpoint_every=1200, sample_tokens=0),
)
