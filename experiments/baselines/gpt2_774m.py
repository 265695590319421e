"""GPT-2 large, 774 M parameters: the difference from 124 M.

Question   how much does the loss fall from 355 M to 774 M parameters?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/baselines/gpt2_774m.py
Cost       about 1.6e21 FLOPs for the same tokens as the 124 M model
Expected   not run here
Source     Radford et al. 2019; rates: Brown et al. 2020, table 2.1
"""

from experiments.baselines import gpt2_124m

experiment = gpt2_124m.experiment.override(
    name="gpt2_774m",
    model=dict(num_layers=36, embed_dim=1280, num_heads=20),
    optim=dict(learning_rate=2.5e-4, final_learning_rate=2.5e-5),
)
