"""Sentiment: is a sentence of a film review positive or negative?

Question   can a model of 1.1 million parameters tell, and how much better than the majority class?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/finetune/sentiment.py
           GPTJAX_DATA=FOLDER gptjax eval runs/sentiment --tasks sentiment
Cost       90 seconds on 2 CPU cores, after experiments/finetune/pretraining.py; --init takes another model
Expected   see experiments/README.md
"""

from gptjax.config import DataConfig, Experiment, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig

experiment = Experiment(
    name="sentiment",
    init="runs/pretraining",
    model=ModelConfig(context_length=128, dropout=0.4),
    data=DataConfig(source="task:sentiment", tokenizer="init"),
    objective=ObjectiveConfig(name="sft"),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=50, beta2=0.95, weight_decay=0.5, ema_decay=0.98),
    train=TrainConfig(steps=320, batch_size=16, eval_every=160, checkpoint_every=160, sample_tokens=0),
)
