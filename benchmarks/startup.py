"""Seconds of waiting: for `gptjax --help`, the first step of the quickstart, and a model of 12 layers to be compiled.

    python benchmarks/startup.py [--rounds 3] [--json]

Cold: an empty cache folder, so that the corpus is tokenised and everything is compiled. Warm: the same command again.
The model is GPT-2 124M with scanned layers; its step is compiled in a new process with no cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUICKSTART = Path(__file__).parent.parent / "experiments" / "quickstart.py"


def first_step(cache: str, run: str) -> float:
    """Seconds until the command says that its first step is done; the command is stopped then."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "gptjax", "train", str(QUICKSTART), "--run-dir", run],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"GPTJAX_CACHE": cache},
    )
    assert process.stderr
    for line in process.stderr:
        if "first step done" in line:
            seconds = time.perf_counter() - began
            process.kill()
            process.wait()
            return seconds
    raise SystemExit("the command ended before its first step")


def help_text() -> float:
    """Seconds of `gptjax --help`."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "gptjax", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def compiling() -> float:
    """Seconds to trace and compile the step of 12 scanned layers."""
    import jax

    from gptjax import cpu
    from gptjax.loading import load_experiment
    from gptjax.training.train_setup import build_train_setup, first_state

    cpu.use_cores()
    e = load_experiment(str(QUICKSTART)).override(
        model=dict(num_layers=12, num_heads=12, embed_dim=768, context_length=1024, layers="scan"),
        train=dict(batch_size=2),
    )
    setup = build_train_setup(e)
    with jax.set_mesh(setup.mesh):
        state, batch = first_state(setup, None), setup.batches.device_batch(0, setup.mesh)
        began = time.perf_counter()
        setup.lower(state, batch).compile()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the medians")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        print(compiling())
        return
    seconds: dict[str, list[float]] = {"help": [], "cold": [], "warm": [], "compile": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            seconds["help"].append(help_text())
            seconds["cold"].append(first_step(f"{scratch}/cache", f"{scratch}/cold"))
            seconds["warm"].append(first_step(f"{scratch}/cache", f"{scratch}/warm"))
            ended = subprocess.run(
                [sys.executable, __file__, "--compile"], check=True, stdout=subprocess.PIPE, text=True
            )
            seconds["compile"].append(float(ended.stdout.splitlines()[-1]))
    for name, each in seconds.items():
        print(f"{name:<8} median {statistics.median(each):.2f} s (from {min(each):.2f} to {max(each):.2f})")
    if options.json:
        print(json.dumps({name: statistics.median(each) for name, each in seconds.items()}))


if __name__ == "__main__":
    main()
