"""Translation: French to Portuguese, verse by verse.

Question   what does a model of 1.1 million parameters learn of it from 1,227 verses?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/finetune/translation.py
           GPTJAX_DATA=FOLDER gptjax eval runs/translation --tasks translation
Cost       9 minutes on 2 CPU cores, after experiments/finetune/pretraining.py; --init takes another model
Expected   see experiments/README.md
"""

from gptjax.config import DataConfig, Experiment, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig

experiment = Experiment(
    name="translation",
    init="runs/pretraining",
    model=ModelConfig(context_length=512, dropout=0.1),
    data=DataConfig(source="task:translation", tokenizer="init"),
    objective=ObjectiveConfig(name="sft"),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=50, beta2=0.95),
    train=TrainConfig(steps=1400, batch_size=4, eval_every=350, checkpoint_every=350, sample_tokens=0),
)
