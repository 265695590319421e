"""Schedules: how should the rate end?

Question   which decline of the learning rate gives the lowest loss?
Command    gptjax sweep experiments/ablations/schedules.py --seeds 3 --workers 2
           gptjax report runs/schedules
Cost       18 minutes on 2 CPU cores (4 variants, 3 seeds)
Expected   see experiments/README.md
"""

from experiments.ablations.small import experiment as small
from gptjax.config import grid

experiment = small.override(name="schedules")
sweep = grid(experiment, {"optim.schedule": ["cosine", "linear", "wsd", "constant"]})
