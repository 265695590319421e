"""Tokens/s and MFU of GPT-2's shapes in bfloat16 on one GPU, against the same model in PyTorch (transformers).

    python benchmarks/train_gpu.py [--shapes 124m 1b5] [--peers compile eager] [--rounds 5] [--batch N] [--tiny]

They take turns, a few steps each; PyTorch runs under bfloat16 autocast with SDPA attention and a fused AdamW. MFU
counts 6 N + 12 L D T FLOPs/token (see `gptjax.model.size.flops_per_token`) against the data sheet's dense
bfloat16 peak. A ratio above 1 means that gptjax is faster. `--tiny` checks the script on a CPU.
"""

import argparse
import json
import statistics
from dataclasses import replace

from side_by_side import Worker, device_of, ratio, serve, take_turns
from steps import Shape, make

SHAPES = {  # with a vocabulary that divides by 128, as nanoGPT pads it
    "124m": Shape(12, 12, 768, 1024, 32, vocab=50304),
    "1b5": Shape(48, 25, 1600, 1024, 4, vocab=50304),
}
TINY = Shape(2, 2, 64, 64, 4, vocab=512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["124m"], choices=SHAPES)
    parser.add_argument("--peers", nargs="*", default=["compile"], choices=["compile", "eager"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, help="rows; None: as the shape has them")
    parser.add_argument("--tiny", action="store_true", help="a small model: whether it works, not how fast")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the figures")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()

    def sized(name: str) -> Shape:
        shape = TINY if options.tiny else SHAPES[name]
        return replace(shape, batch=options.batch or shape.batch)

    if options.serve:
        kind, name = options.serve
        device, figures = device_of(kind)[0], {}
        made, measured = make(kind, sized(name), "bfloat16", device)
        if kind == "gptjax":
            from gptjax.training.hardware import peak_flops

            figures = dict(zip(("peak_flops", "source"), peak_flops(), strict=True)) | {"device": device_of(kind)[1]}
        serve(made, measured | figures)
        return
    worker_arguments = [
        *(["--tiny"] if options.tiny else []),
        *(["--batch", str(options.batch)] if options.batch else []),
    ]
    found = {}
    for name in options.shapes:
        shape = sized(name)
        workers = {kind: Worker(kind, name, *worker_arguments) for kind in ("gptjax", *options.peers)}
        times = take_turns(workers, 5, options.rounds)
        figures, ours = workers["gptjax"].figures, times.pop("gptjax")
        speed = shape.batch * shape.context / statistics.median(ours)
        mfu = speed * figures["flops"] / figures["peak_flops"]
        found[name] = {"tokens_per_second": speed, "mfu": mfu, "peak_bytes": figures["peak"]}
        print(
            f"{figures['device']}, {name}, batch {shape.batch} x {shape.context}: "
            f"{statistics.median(ours) * 1e3:.1f} ms/step ({min(ours) * 1e3:.1f} to {max(ours) * 1e3:.1f}), "
            f"{speed:,.0f} tokens/s, MFU {mfu:.1%} of {figures['peak_flops'] / 1e12:.3g} TFLOP/s "
            f"({figures['source']}), {figures['peak'] / 1e9:.1f} GB",
            flush=True,
        )
        for kind, theirs in times.items():
            found[name][f"vs_{kind}"], text = ratio(ours, theirs)
            print(f"  PyTorch {kind:<8}{statistics.median(theirs) * 1e3:8.1f} ms   ratio {text}", flush=True)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
