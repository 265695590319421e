"""What the ablations vary: the quickstart's model, trained for 600 of its 1,000 steps.

Question   what is everything else compared with?
Command    gptjax train experiments/ablations/small.py
Cost       90 seconds on 2 CPU cores, 150 on one
Expected   see experiments/README.md

Four epochs of the language reference. What is found with so small a model on so little text is a beginning: every
finding names its size.
"""

from experiments.quickstart import experiment as quickstart

experiment = quickstart.override(
    name="small",
    optim=dict(final_learning_rate=3e-4),
    train=dict(steps=600, eval_every=300, checkpoint_every=300, sample_tokens=60),
)
