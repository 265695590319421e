"""Tokens/s of gptjax against `transformers.generate`, side by side on this CPU, and what it costs in memory.

    python benchmarks/decode_cpu.py [--rounds 5] [--tiny] [--json]

Both continue random prompts of 16 tokens greedily, with 64 new tokens each and random weights in the shape of GPT-2
(124 million). They take turns. A ratio is gptjax's tokens/s over those of transformers; the spread is that of
the single rounds. Besides: the share of the machine's memory bandwidth, which bounds a batch of one (a sum over an
array of 1 GB is taken as all of it), the time to the first token, and the size of the cache.
"""

import argparse
import json
import statistics
import time

import side_by_side
from decoding import NEW, make


def bandwidth() -> float:
    """Bytes/s that this machine reads: the sum of 1 GB by all cores."""
    import torch

    array = torch.ones(1 << 28)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        array.sum()
        times.append(time.perf_counter() - began)
    return array.nbytes / min(times)


def compare(batch: int, dtype: str, tiny: bool, rounds: int) -> tuple[dict[str, list[float]], dict[str, dict]]:
    """Seconds a round of gptjax (in this dtype and, next to bfloat16, in 8 bits) and of transformers."""
    kinds = {"gptjax": ("gptjax", dtype), "transformers": ("transformers", dtype)}
    if dtype == "bfloat16":
        kinds["gptjax int8"] = ("gptjax", "int8")
    last = [str(batch), *(["--tiny"] if tiny else [])]
    workers = {name: side_by_side.Worker(kind, numbers, *last) for name, (kind, numbers) in kinds.items()}
    times = side_by_side.take_turns(workers, 1, rounds)
    return times, {name: worker.figures for name, worker in workers.items()}


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
        if kind == "bandwidth":
            side_by_side.serve(lambda: None, {"bandwidth": bandwidth()})
        else:
            side_by_side.serve(*make(kind, dtype, int(batch), options.tiny))
        return
    worker = side_by_side.Worker("bandwidth", "float32", "1")
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
                    found, text = side_by_side.ratio(seconds, times["transformers"])
                    ratios[f"{dtype if name == 'gptjax' else 'int8'}_batch_{batch}"] = found
                    size = figures[name]["weight bytes"]
                    line += (
                        f"   {text};  {size / 1e6:.0f} MB of weights/step, "
                        f"{size / (typical / NEW) / available:.0%} of the bandwidth;  cache "
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
