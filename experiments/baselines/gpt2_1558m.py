"""GPT-2 XL, 1.5 B parameters: the difference from 124 M.

Question   how much does the loss fall from 774 M to 1.5 B parameters?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/baselines/gpt2_1558m.py
Cost       about 3.2e21 FLOPs for the same tokens as the 124 M model
Expected   not run here
Source     Radford et al. 2019; rates: Brown et al. 2020, table 2.1
"""

from experiments.baselines import gpt2_124m

experiment = gpt2_124m.experiment.override(
    name="gpt2_1558m",
    model=dict(num_layers=48, embed_dim=1600, num_heads=25),
    optim=dict(learning_rate=2e-4, final_learning_rate=2e-5),
    train=dict(microbatches=64),
)
