"""GPT-2, 124 M parameters, trained as nanoGPT reproduces it.

Question   the reference for everything at this size: what loss does plain GPT-2 reach on OpenWebText?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/baselines/gpt2_124m.py
Cost       about 2.9e20 FLOPs for the 300 billion tokens: a node of 8 large GPUs for days
Expected   validation loss about 2.85 nats a token (nanoGPT, README); not run here
Source     Radford et al. 2019; rates and batch: Brown et al. 2020, table 2.1
"""

from gptjax.config import DataConfig, Experiment, ModelConfig, OptimConfig, TrainConfig

experiment = Experiment(
    name="gpt2_124m",
    model=ModelConfig(
        vocab_size=50257,
        context_length=1024,
        num_layers=12,
        embed_dim=768,
        num_heads=12,
        dtype="bfloat16",
        remat="dots",
    ),
    data=DataConfig(source="hub:Skylion007/openwebtext", tokenizer="$GPTJAX_DATA/gpt2_bpe", val_fraction=0.0005),
    optim=OptimConfig(learning_rate=6e-4, final_learning_rate=6e-5, warmup_steps=2000, beta2=0.95),
    train=TrainConfig(steps=600_000, batch_size=512, microbatches=32, eval_every=2000, checkpoint_every=2000),
)
