"""GRPO with a verifiable reward (Shao et al. 2024): sums that are right are written more often.

Question   does a model that was taught addition and stopped early get better by being told only whether it is right?
Command    gptjax train experiments/finetune/grpo.py
           gptjax eval runs/grpo --tasks addition --temperature 1 --compare-with runs/addition
Cost       2 min 20 s on 2 CPU cores; after experiments/finetune/addition.py
Expected   see experiments/README.md
"""

from gptjax.config import DataConfig, Experiment, ObjectiveConfig, OptimConfig, TrainConfig

experiment = Experiment(
    name="grpo",
    init="runs/addition",
    data=DataConfig(source="task:addition", tokenizer="init"),
    objective=ObjectiveConfig(name="grpo", reward="exact_match", num_generations=8, max_new_tokens=6, beta=0.01),
    optim=OptimConfig(learning_rate=3e-4, warmup_steps=10, weight_decay=0.0),
    train=TrainConfig(steps=300, batch_size=256, eval_every=50, checkpoint_every=100, sample_tokens=0),
)
