"""Batch size: the same tokens in more steps or in fewer?

Question   at equal tokens, what do larger batches lose when the rate grows with the root of the batch?
Command    gptjax sweep experiments/ablations/batch_size.py --seeds 3 --workers 2
           gptjax report runs/batch_size
Cost       20 minutes on 2 CPU cores (4 variants, 3 seeds)
Expected   see experiments/README.md
"""

from experiments.ablations.small import experiment as small
from gptjax.config import zip_

experiment = small.override(name="batch_size")
sweep = zip_(
    experiment,
    {
        "train.batch_size": [8, 4, 16, 32],
        "train.steps": [600, 1200, 300, 150],
        "optim.learning_rate": [3e-3, 2.1e-3, 4.2e-3, 6e-3],
        "optim.warmup_steps": [50, 100, 25, 12],
        "train.eval_every": [300, 600, 150, 75],
        "train.checkpoint_every": [300, 600, 150, 75],
    },
)
