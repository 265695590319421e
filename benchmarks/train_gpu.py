"""Tokens/s and MFU of GPT-2 124M in bfloat16 on one GPU, on random tokens.

    python benchmarks/train_gpu.py [--batch 32] [--steps 20] [--tiny]

MFU counts 6 N + 12 L D T FLOPs a token (see `gptjax.training.metrics.flops_per_token`) against the data sheet's dense
bfloat16 peak. `--tiny` runs a small shape anywhere, to check the script.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from gptjax.data.objectives import Batch
from gptjax.loading import load_experiment
from gptjax.model.attention import choose_kernel
from gptjax.model.gpt import GPT
from gptjax.training.metrics import flops_per_token, memory_bytes, num_params, peak_flops
from gptjax.training.optim import make_optimizer
from gptjax.training.state import init_state
from gptjax.training.step import train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    e = load_experiment(str(Path(__file__).parent.parent / "experiments" / "baselines" / "gpt2_124m.py"))
    e = e.override(model=dict(vocab_size=50304, remat="none", layers="unrolled"))
    if options.tiny:
        e = e.override(model=dict(vocab_size=512, num_layers=2, embed_dim=64, num_heads=2, context_length=64))
    m, tx = e.model, make_optimizer(e)
    state = jax.jit(lambda: init_state(e, tx))()
    step = jax.jit(partial(train_step, model=GPT(m), tx=tx), donate_argnums=0)
    shape = (1, options.batch, m.context_length)
    tokens = np.random.default_rng(0).integers(0, m.vocab_size, (*shape[:2], shape[2] + 1)).astype(np.int32)
    batch = jax.device_put(Batch(tokens[..., :-1], tokens[..., 1:], np.ones(shape, np.float32)))
    seconds = []
    for _ in range(options.steps + 3):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)
    each, (peak, source) = statistics.median(seconds[3:]), peak_flops()
    speed = options.batch * m.context_length / each
    mfu = speed * flops_per_token(m) / peak
    low, high = min(seconds[3:]) * 1e3, max(seconds[3:]) * 1e3
    kernel = choose_kernel(m, jax.default_backend())
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, attention by {kernel[0]} ({kernel[1]})")
    print(f"{num_params(m)['total']:,} parameters, batch {options.batch} x {m.context_length}")
    print(f"{each * 1e3:.1f} ms a step (from {low:.1f} to {high:.1f}), {speed:,.0f} tokens/s")
    print(f"MFU {mfu:.1%} of {peak / 1e12:.3g} TFLOP/s ({source}), {memory_bytes() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
