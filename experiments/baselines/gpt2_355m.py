"""GPT-2 medium, 355 M parameters: the difference from 124 M.

Question   how much does the loss fall from 124 M to 355 M parameters?
Command    GPTJAX_DATA=FOLDER gptjax train experiments/baselines/gpt2_355m.py
Cost       about 7.5e20 FLOPs for the same tokens as the 124 M model
Expected   not run here
Source     Radford et al. 2019; rates: Brown et al. 2020, table 2.1
"""

from experiments.baselines import gpt2_124m

experiment = gpt2_124m.experiment.override(
    name="gpt2_355m",
    model=dict(num_layers=24, embed_dim=1024, num_heads=16),
    optim=dict(learning_rate=3e-4, final_learning_rate=3e-5),
)
