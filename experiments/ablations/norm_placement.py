"""Norm placement: before a branch, or after its sum?

Question   how much does post-norm lose without a longer warm-up, at two rates? (Xiong et al. 2020)
Command    gptjax sweep experiments/ablations/norm_placement.py --seeds 3 --workers 2
           gptjax report runs/norm_placement
Cost       18 minutes on 2 CPU cores (4 variants, 3 seeds)
Expected   see experiments/README.md
"""

from experiments.ablations.small import experiment as small
from gptjax.config import grid

experiment = small.override(name="norm_placement")
sweep = grid(experiment, {"model.norm_placement": ["pre", "post"], "optim.learning_rate": [3e-3, 1e-2]})
