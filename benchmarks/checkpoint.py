"""What saving costs while a model of 10 million parameters trains: the stall of the loop, and the checksums.

    python benchmarks/checkpoint.py [--seconds 10] [--saves 5]

Trains with a save every `--seconds`, and compares with the same loop without saves, in turn. Prints for each save how
long the loop was blocked (the call that starts it), how much slower the steps during the save were, and how long all
checksums of a checkpoint took in the background.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax

from gptjax import cpu
from gptjax.config import Experiment
from gptjax.model.size import num_params
from gptjax.training import checkpoint
from gptjax.training.train_setup import build_train_setup, create_state, enable_compilation_cache

LARGE = Experiment(name="ten-million").override(
    model=dict(context_length=64, num_layers=12, embed_dim=264, num_heads=4, positions="rope", layers="unrolled"),
    train=dict(steps=100_000, batch_size=4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="between two saves")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that the script works")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    cpu.use_cores()
    enable_compilation_cache()
    setup = build_train_setup(LARGE.override(model=dict(num_layers=1, embed_dim=32)) if options.tiny else LARGE)
    with tempfile.TemporaryDirectory() as name, jax.set_mesh(setup.mesh):
        figures = measure(setup, Path(name), options.seconds, options.saves)
    size = num_params(setup.experiment.model)["total"]
    print(f"{size:,} parameters, {figures['checkpoint_bytes'] / 1e6:.0f} MB a checkpoint, a save every "
          f"{options.seconds:.0f} s, {options.saves} of them")  # fmt: skip
    for name in ("stall_seconds", "slowdown_seconds", "checksum_seconds"):
        values = figures[name]
        print(f"  {name:<18} median {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})")
    share = statistics.median(figures["stall_seconds"]) / options.seconds
    both = share + statistics.median(figures["slowdown_seconds"]) / options.seconds
    print(f"  the loop is blocked for {share:.2%} of the interval; with slower steps during the save {both:.2%}")
    if options.json:
        print(json.dumps(figures | {"num_params": size, "stall_share": share, "all_share": both}))


def measure(setup, folder: Path, seconds: float, saves: int) -> dict:
    state = create_state(setup.experiment, setup.tx, setup.abstract)
    writer = checkpoint.CheckpointWriter(folder.absolute() / "checkpoints", 2, 1)
    step, found = 0, {"stall_seconds": [], "slowdown_seconds": [], "checksum_seconds": []}

    def run(for_seconds: float) -> tuple[float, int]:
        """Trains for so long; returns the time it took and the steps."""
        nonlocal state, step
        began, first = time.perf_counter(), step
        while time.perf_counter() - began < for_seconds:
            state, metrics = setup.train_step(state, setup.batches.device_batch(step, setup.mesh))
            metrics["loss"].block_until_ready()
            step += 1
        return time.perf_counter() - began, step - first

    run(seconds / 5)
    writer.save(state, setup.batches.position(step))  # the first one opens files and starts threads
    writer.wait()
    for _ in range(saves):
        alone, steps_alone = run(seconds)
        before = writer.checksum_seconds
        began = time.perf_counter()
        writer.save(state, setup.batches.position(step))
        stall = time.perf_counter() - began
        during, steps_during = run(seconds - stall)
        writer.wait()
        found["stall_seconds"].append(stall)
        found["slowdown_seconds"].append(during - steps_during * alone / steps_alone)
        found["checksum_seconds"].append(writer.checksum_seconds - before)
    writer.close()
    found["checkpoint_bytes"] = checkpoint.state_bytes(setup.abstract)
    return found


if __name__ == "__main__":
    main()
