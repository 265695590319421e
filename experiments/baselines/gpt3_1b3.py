"""The shape of GPT-3 XL, 1.3 B parameters.

The paper's table gives it 24 heads of 128 on a width of 2048; that would be 1.5 B. 16 heads, as wide as the model, give
the published size, so these are taken.

Question   what does GPT-3's recipe give at 1.3 B parameters?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/baselines/gpt3_1b3.py
Cost       about 2.4e21 FLOPs for the paper's 300 billion tokens
Expected   not run here; attention is dense in every layer, where GPT-3's is sparse in every second
Source     Brown et al. 2020, table 2.1 and appendix B
"""

from experiments.baselines import gpt2_124m

experiment = gpt2_124m.experiment.override(
    name="gpt3_1b3",
    model=dict(context_length=2048, num_layers=24, embed_dim=2048, num_heads=16, head_dim=128),
    optim=dict(learning_rate=2e-4, final_learning_rate=2e-5, warmup_steps=375),
    train=dict(steps=300_000, batch_size=512),
)
