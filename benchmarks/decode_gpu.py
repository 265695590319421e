"""Tokens/s of gptjax against `transformers.generate` on one GPU, in bfloat16, and the share of the bandwidth.

    python benchmarks/decode_gpu.py [--rounds 5] [--batches 1 8 64] [--tiny] [--json]

As `decode_cpu.py`: GPT-2's shape with random weights, prompts of 16 tokens, 64 new ones, greedy, in turn. At batch 1
every weight is read once per token, so that the bandwidth of the data sheet bounds it. `--tiny` checks the script on a
CPU, where no bandwidth is known.
"""

import argparse
import json
import statistics

from decoding import NEW, make
from side_by_side import Worker, device_of, ratio, serve, take_turns

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.039e12}  # bytes/s; data sheets of the SXM cards, 80 GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a small model: whether it works, not how fast")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the figures")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        kind, batch = options.serve
        device, name = device_of(kind)
        made, figures = make(kind, "bfloat16", int(batch), options.tiny, device)
        serve(made, figures | {"device": name})
        return
    found = {}
    for batch in options.batches:
        last = [str(batch), *(["--tiny"] if options.tiny else [])]
        workers = {kind: Worker(kind, *last) for kind in ("gptjax", "transformers")}
        times = take_turns(workers, 1, options.rounds)
        ours, figures = statistics.median(times["gptjax"]), workers["gptjax"].figures
        faster, text = ratio(times["gptjax"], times["transformers"])
        limit = next((speed for card, speed in BANDWIDTH.items() if card in figures["device"]), None)
        read = figures["weight bytes"] * NEW / ours
        share = f"{read / limit:.0%} of the bandwidth" if limit else "of an unknown bandwidth"
        found[f"batch_{batch}"] = {"tokens_per_second": batch * NEW / ours, "ratio": faster,
                                   "bandwidth_share": read / limit if limit else None}  # fmt: skip
        print(
            f"{figures['device']}, batch {batch}: {batch * NEW / ours:,.0f} tokens/s, {text}; weights at "
            f"{read / 1e9:,.0f} GB/s, {share}; first token {figures['first token, warm'] * 1e3:.0f} ms",
            flush=True,
        )
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
