"""Peak memory of a training step, gptjax against the same GPT-2 in PyTorch (transformers) on this CPU.

    python benchmarks/memory.py [--shapes small large gpt2] [--tiny] [--json]

Each trains in a process of its own. The peak is that of the whole process after three steps, libraries and compiler
included; "above the import" is that less what the process had when everything was imported. Who compiles, gptjax and
compiled PyTorch, trains twice: the first run fills an empty cache of compiled programs, and the second finds them
there, as every later run of an experiment does. A ratio above 1 means that gptjax takes less.
"""

import argparse
import json
import os
import tempfile

from side_by_side import Worker, peak_bytes, serve
from steps import Shape, make

SHAPES = {
    "small": Shape(4, 4, 128, 64, 12),
    "large": Shape(6, 6, 384, 256, 8),
    "gpt2": Shape(12, 12, 768, 1024, 1, vocab=50257),
}
TINY = Shape(2, 2, 32, 32, 4)


def imported(kind: str) -> int:
    """The peak when the libraries are there and nothing has been made."""
    if kind == "gptjax":
        import jax.numpy

        from gptjax import cpu
        from gptjax.training.train_setup import enable_compilation_cache

        cpu.use_cores()
        enable_compilation_cache()
        jax.numpy.zeros(1).block_until_ready()
    else:
        import torch
        from transformers import GPT2LMHeadModel  # noqa: F401

        torch.zeros(1)
    return peak_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--peers", nargs="+", default=["eager", "compile"], choices=["eager", "compile"])
    parser.add_argument("--tiny", action="store_true", help="a small model: whether it works")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the ratios")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        kind, shape = options.serve
        before = imported(kind)
        work, figures = make(kind, TINY if shape == "tiny" else SHAPES[shape], "float32")
        serve(work, figures | {"imported": before})
        return
    ratios = {}
    for shape in ["tiny"] if options.tiny else options.shapes:
        with tempfile.TemporaryDirectory() as cache:
            os.environ |= {"GPTJAX_CACHE": f"{cache}/gptjax", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch"}
            ratios |= compare(shape, options.peers)
    if options.json:
        print(json.dumps(ratios))


def compare(shape: str, peers: list[str]) -> dict[str, float]:
    """Prints a shape's peaks, and returns how many times those of gptjax the peers' are, first and later runs."""
    ours, ratios = {}, {}
    for kind in ("gptjax", *peers):
        for run in ("first",) if kind == "eager" else ("first", "later"):
            worker = Worker(kind, shape)
            worker.seconds(1)
            worker.close()
            peak, above = worker.figures["peak"], worker.figures["peak"] - worker.figures["imported"]
            text = f"{shape:<6} {kind:<8} {run:<6} peak {peak / 1e6:6,.0f} MB, above the import {above / 1e6:6,.0f} MB"
            if kind == "gptjax":
                ours[run] = (peak, above)
            for against in ours if kind == "eager" else [run] if kind != "gptjax" else []:
                whole, more = peak / ours[against][0], above / ours[against][1]
                text += f"   {whole:.2f}x and {more:.2f}x of gptjax's {against} run"
                ratios[f"{shape}_vs_{kind}" + ("" if against == "first" else "_later")] = whole
            print(text, flush=True)
    return ratios


if __name__ == "__main__":
    main()
