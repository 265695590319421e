"""Named entities: which people, places and things does a message name?

Question   does a model of 0.6 million parameters write out entities that it has not seen before?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/finetune/entities.py
           GPTJAX_DATA=FOLDER gptjax eval runs/entities --tasks entities
Cost       2 min 20 s on 2 CPU cores, after experiments/finetune/correction.py; --init takes another model
Expected   see experiments/README.md
"""

from gptjax.config import DataConfig, Experiment, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig

experiment = Experiment(
    name="entities",
    init="runs/correction",  # it reads bytes and can copy; pieces of words never gave a name back
    model=ModelConfig(context_length=448, dropout=0.1),
    data=DataConfig(source="task:entities", tokenizer="init"),
    objective=ObjectiveConfig(name="sft"),
    optim=OptimConfig(name="muon", learning_rate=2e-3, warmup_steps=20, beta2=0.95),
    train=TrainConfig(steps=600, batch_size=4, eval_every=300, checkpoint_every=300, sample_tokens=0),
)
