"""Positions: how does a model best know the order of its tokens?

Question   which of RoPE, a learned table, ALiBi and nothing at all gives the lowest loss?
Command    gptjax sweep experiments/ablations/positions.py --seeds 3 --workers 2
           gptjax report runs/positions
Cost       18 minutes on 2 CPU cores (4 variants, 3 seeds)
Expected   see experiments/README.md

Within the training length; experiments/papers/alibi.py goes beyond it.
"""

from experiments.ablations.small import experiment as small
from gptjax.config import grid

experiment = small.override(name="positions")
sweep = grid(experiment, {"model.positions": ["rope", "learned", "alibi", "none"]})
