"""The first run: a small GPT learns to write like the Python language reference, which ships inside every Python.

Question   does everything work, and what does a trained model look like?
Command    gptjax train experiments/quickstart.py
Cost       under 3 minutes on 2 CPU cores, no download
Expected   see experiments/README.md
"""

from gptjax.config import DataConfig, Experiment, ModelConfig, OptimConfig, TrainConfig

experiment = Experiment(
    name="quickstart",
    model=ModelConfig(
        context_length=128,
        num_layers=4,
        embed_dim=128,
        num_heads=4,
        positions="rope",
        norm="rmsnorm",
        ffn="gelu",
        bias=False,
        layers="unrolled",
    ),
    data=DataConfig(source="pydoc", tokenizer="sentencepiece", tokenizer_vocab_size=1024),
    optim=OptimConfig(name="adamw", learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=50, beta2=0.95),
    train=TrainConfig(
        steps=1000, batch_size=8, eval_every=250, checkpoint_every=500, sample_prompt='The "for" statement'
    ),
)
