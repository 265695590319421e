"""Generation: a passage of a play is continued.

Question   is a continuation by 1.1 million parameters nearer to the true one than the beginning is?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/finetune/generation.py
           GPTJAX_DATA=FOLDER gptjax eval runs/generation --tasks generation
Cost       3 minutes on 2 CPU cores, after experiments/finetune/pretraining.py; --init takes another model
Expected   see experiments/README.md
"""

from gptjax.config import DataConfig, Experiment, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig

experiment = Experiment(
    name="generation",
    init="runs/pretraining",
    model=ModelConfig(context_length=512, dropout=0.1),
    data=DataConfig(source="task:generation", tokenizer="init"),
    objective=ObjectiveConfig(name="sft"),
    optim=OptimConfig(name="muon", learning_rate=2e-3, warmup_steps=20, beta2=0.95),
    train=TrainConfig(steps=400, batch_size=4, eval_every=100, checkpoint_every=100, sample_tokens=0),
)
