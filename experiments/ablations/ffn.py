"""FFN: is a gate worth its third matrix?

Question   is SwiGLU better than GELU with exactly as many weights?
Command    gptjax sweep experiments/ablations/ffn.py --seeds 3 --workers 2
           gptjax report runs/ffn
Cost       9 minutes on 2 CPU cores (2 variants, 3 seeds)
Expected   see experiments/README.md

GELU has two matrices of width 384 and SwiGLU three of 256 (Shazeer 2020).
"""

from experiments.ablations.small import experiment as small
from gptjax.config import zip_

experiment = small.override(name="ffn", model=dict(ffn_dim=384))
sweep = zip_(experiment, {"model.ffn": ["gelu", "swiglu"], "model.ffn_dim": [384, 256]})
