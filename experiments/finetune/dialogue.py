"""Dialogue: a coffee bar's agent, to talk to by `gptjax chat runs/dialogue`.

Question   are 154 dialogues enough to answer better than by the most common answer?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/finetune/dialogue.py
           GPTJAX_DATA=FOLDER gptjax eval runs/dialogue --tasks dialogue
Cost       45 seconds on 2 CPU cores, after experiments/finetune/pretraining.py; --init takes another model
Expected   see experiments/README.md
"""

from gptjax.config import DataConfig, Experiment, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig

experiment = Experiment(
    name="dialogue",
    init="runs/pretraining",
    model=ModelConfig(context_length=512, dropout=0.1),
    data=DataConfig(source="task:dialogue", tokenizer="init"),
    objective=ObjectiveConfig(name="sft"),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=20, beta2=0.95),
    train=TrainConfig(steps=200, batch_size=2, eval_every=50, checkpoint_every=50, sample_tokens=0),
)
