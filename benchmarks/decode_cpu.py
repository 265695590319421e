"""Tokens a second of gptjax against `transformers.generate`, side by side on this CPU, and what it costs in memory.

    python benchmarks/decode_cpu.py [--rounds 5] [--tiny] [--json]

Both go on greedily with random prompts of 16 tokens, 64 new tokens each, with random weights in the shape of GPT-2
(124 million). They take turns. A ratio is gptjax's tokens a second over those of transformers; the spread is that of
the single rounds. Besides: the share of the machine's memory bandwidth, which bounds a batch of one (a sum over an
array of 1 GB is taken as all of it), the time to the first token, and the size of the cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

SHAPE = dict(layers=12, heads=12, width=768, context=1024, vocab=50257)
TINY = dict(layers=2, heads=2, width=32, context=128, vocab=199)
PROMPT, NEW = 16, 64


def gptjax_maker(shape: dict[str, int], dtype: str, batch: int) -> tuple[Callable[[], None], dict[str, float]]:
    """One call writes all tokens."""
    import jax
    import numpy as np

    from gptjax.config import Model
    from gptjax.data.tokenizer import CharTokenizer
    from gptjax.inference.cache import cache_bytes, slots_for
    from gptjax.inference.engine import make_engine
    from gptjax.inference.generate import Request, generate
    from gptjax.inference.pretrained import Pretrained
    from gptjax.inference.rules import Sampling
    from gptjax.model.gpt import init_params
    from gptjax.training.workshop import enable_compilation_cache

    enable_compilation_cache()
    model = Model(
        vocab_size=shape["vocab"], num_layers=shape["layers"], num_heads=shape["heads"], embed_dim=shape["width"],
        context_length=shape["context"],
    ).resolved()  # fmt: skip
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    tokens = CharTokenizer("".join(chr(0x10000 + i) for i in range(shape["vocab"])), False)
    engine = make_engine(Pretrained("random", model, params, tokens), dtype)
    del params
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, shape["vocab"], (batch, PROMPT)).astype(np.int32)
    requests = [Request(p, NEW, Sampling(temperature=0)) for p in prompts]

    def first() -> float:
        began = time.perf_counter()
        next(iter(generate(engine, requests)))
        return time.perf_counter() - began

    cold = first()
    figures = {
        "first token, not compiled in this process": cold,
        "first token, warm": statistics.median(first() for _ in range(5)),
        "weight bytes": engine.weight_bytes,
        "cache bytes": cache_bytes(engine.model, batch, slots_for(engine.model, PROMPT + NEW)),
    }

    def one() -> None:
        assert sum(1 for _ in generate(engine, requests)) == NEW

    return one, figures


def torch_maker(shape: dict[str, int], dtype: str, batch: int) -> tuple[Callable[[], None], dict[str, float]]:
    """The same by `transformers.generate` with its key/value cache and SDPA."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shape["vocab"], n_positions=shape["context"], n_embd=shape["width"], n_layer=shape["layers"],
        n_head=shape["heads"], attn_implementation="sdpa",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().to(getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    prompts = torch.randint(0, shape["vocab"], (batch, PROMPT))
    mask = torch.ones_like(prompts)

    def make(tokens: int) -> None:
        with torch.inference_mode():
            out = model.generate(
                prompts, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        assert out.shape[1] == PROMPT + tokens

    make(1)
    began = time.perf_counter()
    make(1)
    return lambda: make(NEW), {"first token, warm": time.perf_counter() - began}


def bandwidth() -> float:
    """Bytes a second that this machine reads: the sum of 1 GB by all cores."""
    import torch

    array = torch.ones(1 << 28)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        array.sum()
        times.append(time.perf_counter() - began)
    return array.nbytes / min(times)


def serve(kind: str, dtype: str, batch: int, tiny: bool) -> None:
    """A worker: warms up, then makes one round for each line of its input."""
    shape = TINY if tiny else SHAPE
    if kind == "bandwidth":
        print(json.dumps({"bandwidth": bandwidth()}), flush=True)
        return
    made, figures = (gptjax_maker if kind == "gptjax" else torch_maker)(shape, dtype, batch)
    made()
    print(json.dumps(figures), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        made()
        print(time.perf_counter() - began, flush=True)


class Worker:
    """A contestant in a process of its own, so that one's threads do not spin while the other is timed."""

    def __init__(self, kind: str, dtype: str, batch: int, tiny: bool):
        command = [sys.executable, __file__, "--serve", kind, dtype, str(batch), *(["--tiny"] if tiny else [])]
        environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        line = self._line()
        if not line.startswith("{"):
            assert self.process.stderr
            raise SystemExit(
                f"{kind} ({dtype}) did not start: pip install 'gptjax[bench]'?\n{self.process.stderr.read()}"
            )
        self.figures: dict[str, float] = json.loads(line)

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def time(self) -> float:
        """Seconds for all tokens."""
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def compare(batch: int, dtype: str, tiny: bool, rounds: int) -> tuple[dict[str, list[float]], dict[str, dict]]:
    """Seconds a round of gptjax (in this dtype and, beside bfloat16, in 8 bits) and of transformers."""
    kinds = {"gptjax": ("gptjax", dtype), "transformers": ("transformers", dtype)}
    if dtype == "bfloat16":
        kinds["gptjax int8"] = ("gptjax", "int8")
    workers = {name: Worker(kind, numbers, batch, tiny) for name, (kind, numbers) in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name].append(worker.time())
    figures = {name: worker.figures for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    return times, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a small model: whether it works, not how fast")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the ratios")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        kind, dtype, batch = options.serve
        serve(kind, dtype, int(batch), options.tiny)
        return
    worker = Worker("bandwidth", "float32", 1, False)
    available = worker.figures["bandwidth"]
    worker.close()
    print(f"memory bandwidth {available / 1e9:.1f} GB/s (a sum over 1 GB)", flush=True)
    ratios = {}
    for batch in options.batches:
        for dtype in ("float32", "bfloat16"):
            times, figures = compare(batch, dtype, options.tiny, options.rounds)
            print(f"batch {batch}, {dtype}", flush=True)
            for name, seconds in times.items():
                typical = statistics.median(seconds)
                line = f"  {name:<14}{batch * NEW / typical:8.1f} tokens/s"
                if name.startswith("gptjax"):
                    each = [b / a for a, b in zip(seconds, times["transformers"], strict=True)]
                    ratio = statistics.median(times["transformers"]) / typical
                    ratios[f"{dtype if name == 'gptjax' else 'int8'}_batch_{batch}"] = ratio
                    size = figures[name]["weight bytes"]
                    line += (
                        f"   {ratio:.2f}x (rounds {min(each):.2f} to {max(each):.2f});  {size / 1e6:.0f} MB of weights "
                        f"a step, {size / (typical / NEW) / available:.0%} of the bandwidth;  cache "
                        f"{figures[name]['cache bytes'] / 1e6:.1f} MB;  first token "
                        f"{figures[name]['first token, warm'] * 1e3:.0f} ms (new process "
                        f"{figures[name]['first token, not compiled in this process']:.2f} s)"
                    )
                else:
                    line += f"   first token {figures[name]['first token, warm'] * 1e3:.0f} ms"
                print(line, flush=True)
    if options.json:
        print(json.dumps(ratios))


if __name__ == "__main__":
    main()
