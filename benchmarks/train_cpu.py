"""Step time of gptjax against the same GPT-2 in PyTorch (transformers), side by side on this CPU.

    python benchmarks/train_cpu.py [--rounds 5] [--shapes small large] [--json]

Both train the same architecture (learned positions, LayerNorm, tanh-GELU, biases, tied head, no dropout) on random
tokens with AdamW and clipping. They take turns: a few steps of one, a few of the other, `--rounds` times. A ratio is
PyTorch's median step time over gptjax's, so more is better for gptjax; the spread is that of the single rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

SHAPES = {  # layers, heads, width, context, batch
    "small": (4, 4, 128, 64, 12),
    "large": (6, 6, 384, 256, 8),
}
VOCAB = 65


def gptjax_step(shape: tuple[int, ...], dtype: str) -> Callable[[], None]:
    """One update with gptjax, as `gptjax train` compiles it."""
    from functools import partial

    import jax
    import numpy as np

    from gptjax import sharding
    from gptjax.config import Experiment
    from gptjax.data.objectives import Batch
    from gptjax.model.gpt import GPT
    from gptjax.training.metrics import num_params
    from gptjax.training.optim import make_optimizer
    from gptjax.training.state import abstract_state, create_state
    from gptjax.training.step import train_step

    sharding.use_cores()
    layers, heads, width, context, batch = shape
    e = Experiment().override(
        model=dict(vocab_size=VOCAB, num_layers=layers, num_heads=heads, embed_dim=width, context_length=context,
                   dtype=dtype, layers="unrolled"),
    )  # fmt: skip
    tx, mesh = make_optimizer(e), sharding.make_mesh(e.mesh, batch, 20 * num_params(e.model)["total"])
    abstract = abstract_state(e, tx, mesh)
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    made = dict(donate_argnums=0, out_shardings=(layout, jax.NamedSharding(mesh, jax.P())))
    options = sharding.compiler_options(mesh)
    step = jax.jit(partial(train_step, model=GPT(e.model), tx=tx), compiler_options=options, **made)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, batch, context + 1)).astype(np.int32)
    data = Batch(tokens[..., :-1], tokens[..., 1:], np.ones((1, batch, context), np.float32))
    data = sharding.place(data, ("microbatch", "batch", "length"), mesh)
    box = [create_state(e, tx, abstract)]

    def one() -> None:
        with jax.set_mesh(mesh):
            box[0], metrics = step(box[0], data)
            jax.block_until_ready(metrics)

    return one


def torch_step(shape: tuple[int, ...], dtype: str, compiled: bool) -> Callable[[], None]:
    """One update with transformers' GPT-2, SDPA attention, in eager or compiled PyTorch."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, heads, width, context, batch = shape
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, n_positions=context, n_embd=width, n_layer=layers, n_head=heads)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = GPT2Config(**sizes, **no_dropout, attn_implementation="sdpa", use_cache=False)
    model = GPT2LMHeadModel(config)
    run = torch.compile(model) if compiled else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    tokens = torch.randint(0, VOCAB, (batch, context + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def one() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = run(inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.float().view(-1, VOCAB), targets.view(-1))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    return one


def serve(kind: str, shape: str, dtype: str) -> None:
    """A worker: warms up, then times as many steps as each line of its input asks for."""
    made = (
        gptjax_step(SHAPES[shape], dtype) if kind == "gptjax" else torch_step(SHAPES[shape], dtype, kind == "compile")
    )
    for _ in range(3):
        made()
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            made()
        print((time.perf_counter() - began) / int(line), flush=True)


class Worker:
    """A contestant in a process of its own, so that one's threads do not spin while the other is timed."""

    def __init__(self, kind: str, shape: str, dtype: str):
        command = [sys.executable, __file__, "--serve", kind, shape, dtype]
        quiet = os.environ | {
            "TRANSFORMERS_VERBOSITY": "error"
        }  # and nothing about threads: PASSIVE waiting slows PyTorch
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet)
        if self._line() != "ready":
            raise SystemExit(f"{kind} ({shape}, {dtype}) did not start; pip install 'gptjax[bench]'?")

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def time(self, steps: int) -> float:
        """Seconds a step."""
        assert self.process.stdin
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        self.process.kill()


def compare(shape: str, dtype: str, peers: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds a step of gptjax and each peer, one figure a round."""
    workers = {kind: Worker(kind, shape, dtype) for kind in ["gptjax", *peers]}
    steps = {"small": 15, "large": 2}[shape]
    times: dict[str, list[float]] = {kind: [] for kind in workers}
    for _ in range(rounds):
        for kind, worker in workers.items():
            times[kind].append(worker.time(steps))
    for worker in workers.values():
        worker.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the ratios")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    ratios = {}
    for shape in options.shapes:
        for dtype, peers in (("float32", ["eager", "compile"]), ("bfloat16", ["eager"])):
            times = compare(shape, dtype, peers, options.rounds)
            ours = times.pop("gptjax")
            print(f"{shape} {dtype}: gptjax {statistics.median(ours) * 1e3:.1f} ms a step", flush=True)
            for kind, theirs in times.items():
                each = [b / a for a, b in zip(ours, theirs, strict=True)]
                name = f"{dtype}_vs_{'autocast' if dtype == 'bfloat16' else kind}" + (
                    "_large" if shape == "large" else ""
                )
                ratios[name] = statistics.median(theirs) / statistics.median(ours)
                print(f"  PyTorch {kind:<8} {statistics.median(theirs) * 1e3:8.1f} ms   ratio {ratios[name]:.2f}x "
                      f"(rounds {min(each):.2f} to {max(each):.2f})", flush=True)  # fmt: skip
    if options.json:
        print(json.dumps(ratios))


if __name__ == "__main__":
    main()
