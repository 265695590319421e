"""Step time of gptjax against the same GPT-2 in PyTorch (transformers), side by side on this CPU.

    python benchmarks/train_cpu.py [--rounds 5] [--shapes small large] [--json]

They take turns: a few steps of one, a few of the other, `--rounds` times. A ratio is PyTorch's median step time over
gptjax's, so more is better for gptjax; the spread is that of the single rounds. PyTorch is eager or compiled, with
AdamW as it chooses it (nanoGPT's way on a CPU) or fused, which is quicker and must be requested.
"""

import argparse
import json
import statistics

from side_by_side import Worker, ratio, serve, take_turns
from steps import Shape, make

SHAPES = {"small": Shape(4, 4, 128, 64, 12), "large": Shape(6, 6, 384, 256, 8)}
STEPS = {"small": 15, "large": 2}  # of one before it is the other's turn
PEERS = {  # what is printed -> the kind of PyTorch's step
    "float32": {"eager": "eager", "compile": "compile", "eager-fused": "eager-fused", "compile-fused": "compile-fused"},
    "bfloat16": {"autocast": "eager", "autocast-fused": "eager-fused", "autocast-compile-fused": "compile-fused"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the ratios")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        kind, shape, dtype = options.serve
        serve(*make(kind, SHAPES[shape], dtype))
        return
    ratios = {}
    for shape in options.shapes:
        for dtype, peers in PEERS.items():
            workers = {name: Worker(kind, shape, dtype) for name, kind in {"gptjax": "gptjax", **peers}.items()}
            times = take_turns(workers, STEPS[shape], options.rounds)
            ours = times.pop("gptjax")
            print(f"{shape} {dtype}: gptjax {statistics.median(ours) * 1e3:.1f} ms/step", flush=True)
            for name, theirs in times.items():
                found, text = ratio(ours, theirs)
                ratios[f"{dtype}_vs_{name}{'_large' if shape == 'large' else ''}".replace("-", "_")] = found
                print(f"  PyTorch {name:<22} {statistics.median(theirs) * 1e3:8.1f} ms   ratio {text}", flush=True)
    if options.json:
        print(json.dumps(ratios))


if __name__ == "__main__":
    main()
