"""Pre-training for the tasks: a small GPT reads their training sides as plain text, prompts and answers alike.

Question   what does a model of 1.1 million parameters learn from a few megabytes of the tasks' own text?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/finetune/pretraining.py
Cost       6 minutes on 2 CPU cores
Expected   see experiments/README.md
"""

from gptjax.config import DataConfig, Experiment, ModelConfig, OptimConfig, TrainConfig

SHARES = {
    "task:sentiment": 0.4,
    "task:entities": 0.15,
    "task:summarisation": 0.2,
    "task:translation": 0.1,
    "task:dialogue": 0.03,
    "task:generation": 0.12,  # and not correction, whose held-out lines are among these
}

experiment = Experiment(
    name="pretraining",
    model=ModelConfig(
        context_length=256,
        num_layers=3,
        embed_dim=128,
        num_heads=4,
        positions="rope",
        norm="rmsnorm",
        bias=False,
        layers="unrolled",
    ),
    data=DataConfig(
        source=tuple(SHARES),
        weights=tuple(SHARES.values()),
        tokenizer="sentencepiece",
        tokenizer_vocab_size=4096,
    ),
    optim=OptimConfig(name="muon", learning_rate=4e-3, final_learning_rate=1e-4, warmup_steps=50, beta2=0.95),
    train=TrainConfig(steps=900, batch_size=8, eval_every=450, checkpoint_every=450, sample_prompt="the film is"),
)
