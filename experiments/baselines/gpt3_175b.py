"""The shape of GPT-3, 175 B parameters.

Question   none on one machine: does the largest published shape of its time resolve, lay out and count right?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/baselines/gpt3_175b.py
Cost       3.14e23 FLOPs for the paper's 300 billion tokens (appendix D)
Expected   not run here; attention is dense in every layer, where GPT-3's is sparse in every second
Source     Brown et al. 2020, table 2.1 and appendix B
"""

from experiments.baselines import gpt3_1b3

experiment = gpt3_1b3.experiment.override(
    name="gpt3_175b",
    model=dict(num_layers=96, embed_dim=12288, num_heads=96, head_dim=128, remat="full"),
    optim=dict(learning_rate=6e-5, final_learning_rate=6e-6),
    train=dict(steps=91_500, batch_size=1600, microbatches=25),
    mesh=dict(model=8),
)
