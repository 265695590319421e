"""QK-norm: does it make the learning rate matter less?

Question   at which rates does a model with normalised queries and keys beat one without? (Wortsman et al. 2023)
Command    gptjax sweep experiments/ablations/qk_norm_lr.py --seeds 3 --workers 2
           gptjax report runs/qk_norm_lr
Cost       36 minutes on 2 CPU cores (8 variants, 3 seeds)
Expected   see experiments/README.md
"""

from experiments.ablations.small import experiment as small
from gptjax.config import grid

experiment = small.override(name="qk_norm_lr")
sweep = grid(experiment, {"model.qk_norm": [False, True], "optim.learning_rate": [3e-3, 1e-2, 3e-2, 1e-1]})
