"""Depth and width: the same weights in more layers or in wider ones?

Question   with as many weights in its blocks, is a deep or a wide model better?
Command    gptjax sweep experiments/ablations/depth_width.py --seeds 3 --workers 2
           gptjax report runs/depth_width
Cost       20 minutes on 2 CPU cores (3 variants, 3 seeds)
Expected   see experiments/README.md

Heads are 32 wide in all of them. The embedding is not counted: the wide model has twice that of the first.
"""

from experiments.ablations.small import experiment as small
from gptjax.config import zip_

experiment = small.override(name="depth_width")
sweep = zip_(
    experiment,
    {"model.num_layers": [4, 1, 16], "model.embed_dim": [128, 256, 64], "model.num_heads": [4, 8, 2]},
)
