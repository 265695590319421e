"""Attention heads: how many, and how many of them need keys and values of their own?

Question   what do more heads of less width gain, and what do shared keys and values lose? (GQA, Ainslie et al. 2023)
Command    gptjax sweep experiments/ablations/attention_heads.py --seeds 3 --workers 2
           gptjax report runs/attention_heads
Cost       23 minutes on 2 CPU cores (5 variants, 3 seeds)
Expected   see experiments/README.md

The width stays 128, so that heads are 32, 128 or 16 wide. Fewer keys and values are fewer weights.
"""

from experiments.ablations.small import experiment as small
from gptjax.config import zip_

experiment = small.override(name="attention_heads")
sweep = zip_(
    experiment,
    {"model.num_heads": [4, 1, 8, 4, 4], "model.num_kv_heads": [4, 1, 8, 2, 1]},
)
