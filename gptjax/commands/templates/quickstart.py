"""NAME: write your question here.

Question   does a small GPT learn this text?
Command    gptjax train NAME.py
           gptjax sample runs/NAME 'The "for" statement'
Cost       under 3 minutes on 2 CPU cores, no download
Expected   validation loss about 3.25 nats/token, 1.70 bits/byte

Change any field on the command line, for instance --train.steps 100; `gptjax train NAME.py --help` lists all fields.
"""

from gptjax.config import DataConfig, Experiment, ModelConfig, OptimConfig, TrainConfig

experiment = Experiment(
    name="NAME",  # the run folder is runs/NAME
    model=ModelConfig(
        context_length=128,  # tokens
        num_layers=4,
        embed_dim=128,
        num_heads=4,
        positions="rope",  # or learned, alibi, none
        norm="rmsnorm",  # or layernorm
        ffn="gelu",  # or swiglu, geglu, relu, relu2
        bias=False,
        layers="unrolled",  # faster on a CPU for few layers
    ),
    data=DataConfig(
        source="pydoc",  # the Python language reference; your own text: "my_text.txt", or a folder of .txt files
        tokenizer="sentencepiece",  # trained on the text; or byte, char, or a folder with a tokenizer
        tokenizer_vocab_size=1024,
    ),
    optim=OptimConfig(
        name="adamw",  # or muon
        learning_rate=3e-3,
        final_learning_rate=1e-4,  # at the end of the cosine decay
        warmup_steps=50,
        beta2=0.95,
    ),
    train=TrainConfig(
        steps=1000,
        batch_size=8,  # windows of context_length tokens per step
        eval_every=250,
        checkpoint_every=500,
        sample_prompt='The "for" statement',
    ),
)
