"""Direct preference optimisation: the right sum rather than one beside it.

Question   does a model that was taught addition and stopped early prefer right sums to wrong ones more often, and does
           it write more of them?
Command    gptjax train experiments/finetune/dpo.py
           gptjax eval runs/dpo --tasks addition --temperature 1 --compare-with runs/addition
Cost       20 seconds on 2 CPU cores, after experiments/finetune/addition.py
Expected   see experiments/README.md
"""

from gptjax.config import DataConfig, Experiment, ObjectiveConfig, OptimConfig, TrainConfig

experiment = Experiment(
    name="dpo",
    init="runs/addition",
    data=DataConfig(source="task:addition", rejected="{wrong}", tokenizer="init"),
    objective=ObjectiveConfig(name="dpo", beta=1.0),
    optim=OptimConfig(learning_rate=1e-4, warmup_steps=10, weight_decay=0.0),
    train=TrainConfig(steps=200, batch_size=64, eval_every=50, checkpoint_every=100, sample_tokens=0),
)
