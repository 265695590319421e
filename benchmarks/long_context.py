"""Memory and time of a training step as the context grows: 6 layers of width 384, one text.

    python benchmarks/long_context.py [--contexts 1024 2048 4096 8192] [--peer eager] [--dtype float32] [--json]

gptjax's memory is what the compiled step takes in addition to the state, and the peak of the process; the peer's
(transformers in PyTorch with SDPA attention, `--peer none`: leave it out) the peak alone. Memory that grows linearly
doubles with the context, and the last column says how much it grew.
"""

import argparse
import json

from side_by_side import Worker, device_of, serve
from steps import Shape, make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--peer", default="eager", choices=["eager", "compile", "none"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tiny", action="store_true", help="a small model: whether it works")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the figures")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    base = Shape(2, 2, 32, 64, 1) if options.tiny else Shape(6, 6, 384, 1024, 1)
    if options.serve:
        from dataclasses import replace

        kind, context = options.serve
        serve(*make(kind, replace(base, context=int(context)), options.dtype, device_of(kind)[0]))
        return
    worker_arguments = ["--dtype", options.dtype, *(["--tiny"] if options.tiny else [])]
    found = []
    for kind in ("gptjax", *([] if options.peer == "none" else [options.peer])):
        before = None
        for context in options.contexts:
            worker = Worker(kind, str(context), *worker_arguments)
            seconds = worker.seconds(1)
            worker.close()
            size = worker.figures.get("step", worker.figures["peak"])
            grown = "" if before is None else f"   {size / before:.2f}x"
            step, peak = (worker.figures.get(name, 0) / 1e6 for name in ("step", "peak"))
            print(f"{kind:<8} {context:6,} tokens: {seconds:8.3f} s/step, {context / seconds:9,.0f} tokens/s; "
                  f"step {step:8,.0f} MB, peak {peak:8,.0f} MB{grown}", flush=True)  # fmt: skip
            found.append({"kind": kind, "context": context, "seconds": seconds, **worker.figures})
            before = size
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
