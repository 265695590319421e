"""Summarisation: what does a scientific abstract say, in one sentence?

Question   does a model of 1.1 million parameters say it better than the first sentence of the abstract does?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/finetune/summarisation.py
           GPTJAX_DATA=FOLDER gptjax eval runs/summarisation --tasks summarisation
Cost       4 minutes on 2 CPU cores, after experiments/finetune/pretraining.py; --init takes another model
Expected   see experiments/README.md
"""

from gptjax.config import DataConfig, Experiment, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig

experiment = Experiment(
    name="summarisation",
    init="runs/pretraining",
    model=ModelConfig(context_length=768, dropout=0.1),
    data=DataConfig(source="task:summarisation", tokenizer="init"),
    objective=ObjectiveConfig(name="sft"),
    optim=OptimConfig(name="muon", learning_rate=2e-3, warmup_steps=20, beta2=0.95),
    train=TrainConfig(steps=300, batch_size=4, eval_every=100, checkpoint_every=100, sample_tokens=0),
)
