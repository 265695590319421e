"""RLOO on the edit distance: corrections that are drawn come nearer to the truth.

Question   does a model that was taught to correct by maximum likelihood write better corrections when the expected edit
           distance of what it writes is minimised?
Command    gptjax train experiments/finetune/rloo.py
           gptjax eval runs/rloo --tasks correction --temperature 1 --compare-with runs/correction
Cost       4 min 20 s on 2 CPU cores; after experiments/finetune/correction.py
Expected   see experiments/README.md
"""

from gptjax.config import DataConfig, Experiment, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig

experiment = Experiment(
    name="rloo",
    init="runs/correction",
    model=ModelConfig(context_length=192),  # a line and a correction of it
    data=DataConfig(source="task:correction", tokenizer="init"),
    objective=ObjectiveConfig(name="rloo", reward="edit_distance", num_generations=8, max_new_tokens=80, beta=0.001),
    optim=OptimConfig(learning_rate=1e-4, warmup_steps=10, weight_decay=0.0),
    train=TrainConfig(steps=120, batch_size=64, eval_every=0, checkpoint_every=50, sample_tokens=0),
)
