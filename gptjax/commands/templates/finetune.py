"""NAME: write your question here.

Question   can the pretrained model learn this task?
Command    gptjax train NAME.py --init runs/quickstart
           gptjax sample runs/NAME "a charming film"
Cost       a minute on 2 CPU cores with a small model
Expected   not known yet

--init is the model to start from: a run folder, a Hugging Face folder, or a name on the Hugging Face hub.
"""

from gptjax.config import DataConfig, Experiment, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig

experiment = Experiment(
    name="NAME",
    init="runs/quickstart",  # gptjax new quickstart; gptjax train quickstart.py
    model=ModelConfig(  # the architecture comes from init; only these fields can be set
        context_length=128,
        dropout=0.1,
        # lora_rank=8,  # train LoRA matrices instead of all weights
    ),
    data=DataConfig(
        source="task:sentiment",  # a small sample inside gptjax; your own examples: a .csv or .jsonl file, with
        # prompt="{question}\n",  # the text before the answer; {question} is a column
        # answer="{answer}",
        tokenizer="init",  # that of the model
    ),
    objective=ObjectiveConfig(name="sft"),  # the loss of the answers only; "causal" for plain text
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=20, beta2=0.95),
    train=TrainConfig(steps=200, batch_size=16, eval_every=100, checkpoint_every=100, sample_tokens=0),
)
