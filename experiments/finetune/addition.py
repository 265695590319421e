"""Addition from scratch, as supervised learning: what experiments/finetune/grpo.py starts from.

Question   how far does a small model get in the sums of numbers below 100, when it is stopped early?
Command    gptjax train experiments/finetune/addition.py
           gptjax eval runs/addition --tasks addition --temperature 1
Cost       40 seconds on 2 CPU cores
Expected   see experiments/README.md
"""

from gptjax.config import DataConfig, Experiment, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig

experiment = Experiment(
    name="addition",
    model=ModelConfig(
        context_length=16, num_layers=3, embed_dim=96, num_heads=4, positions="learned", norm="rmsnorm", bias=False,
        layers="unrolled",
    ),
    data=DataConfig(source="task:addition", tokenizer="char"),
    objective=ObjectiveConfig(name="sft"),
    optim=OptimConfig(learning_rate=2e-3, warmup_steps=50, beta2=0.98),
    train=TrainConfig(steps=400, batch_size=64, eval_every=200, checkpoint_every=200, sample_tokens=0),
)  # fmt: skip
