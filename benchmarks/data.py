"""What the data loader costs: making a batch of the quickstart, against the time of the step that eats it.

    python benchmarks/data.py [--steps 60]

Prints the share of the step time that making batches takes (in its own thread) and that steps wait for a batch.
"""

import argparse
import tempfile
import time
from pathlib import Path

from gptjax.data.batches import Batches
from gptjax.loading import load_experiment
from gptjax.training import train
from gptjax.training.workshop import enable_compilation_cache, prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    enable_compilation_cache()
    quickstart = load_experiment(str(Path(__file__).parent.parent / "experiments" / "quickstart.py"))
    e = quickstart.override(train=dict(steps=steps, eval_every=0, checkpoint_every=0), optim=dict(warmup_steps=1))
    shop = prepare(e)
    alone = Batches(shop.store, shop.experiment)
    began = time.perf_counter()
    for step in range(300):
        alone.on_devices(step, shop.mesh)
    each = (time.perf_counter() - began) / 300
    with tempfile.TemporaryDirectory() as folder:
        figures = train.train(e, Path(folder) / "run")
    step_seconds = figures["seconds"] / (steps - 1)
    print(f"a batch, made alone: {each * 1e3:.2f} ms, {shop.batches.tokens_per_step / each:,.0f} tokens/s")
    print(f"a step: {step_seconds * 1e3:.1f} ms; making its batch alone is {each / step_seconds:.2%} of it")
    print(f"in the run: batches took {figures['data_work_share']:.2%} of the step time in their thread, "
          f"steps waited {figures['data_wait_share']:.2%} of it for them")  # fmt: skip


if __name__ == "__main__":
    main()
