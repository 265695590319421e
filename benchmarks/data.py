"""What data costs: tokenising text, and making a batch of the quickstart against the time of the step that eats it.

    python benchmarks/data.py [--steps 60] [--bpe FOLDER] [--json]

Prints MB/s of each tokenizer on one core (with `--bpe` that of a folder with vocab.json and merges.txt, or a
tokenizer.json), the share of the step time that making batches takes (in its own thread), and what steps wait for them.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from gptjax import cpu
from gptjax.data import corpus
from gptjax.data.batches import DataLoader
from gptjax.data.store import CHUNK_CHARS, text_chunks
from gptjax.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from gptjax.loading import load_experiment
from gptjax.objectives import make_objective
from gptjax.training import train
from gptjax.training.train_setup import build_train_setup, enable_compilation_cache

MEGABYTES = 8.0  # to tokenise


def speed(tokenizer: Tokenizer, text: str) -> float:
    """Bytes/s, in the parts that the store makes."""
    parts = list(text_chunks(text, CHUNK_CHARS))
    tokenizer.encode(parts[0][:1000])
    began = time.perf_counter()
    for part in parts:
        tokenizer.encode(part)
    return len(text.encode()) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--bpe", type=Path, help="folder of a byte-level BPE to measure besides")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the figures")
    options = parser.parse_args()
    steps = options.steps
    os.environ["RAYON_NUM_THREADS"] = "1"  # of the BPE's engine
    enable_compilation_cache()
    cpu.use_cores()
    quickstart = load_experiment(str(Path(__file__).parent.parent / "experiments" / "quickstart.py"))
    e = quickstart.override(train=dict(steps=steps, eval_every=0, checkpoint_every=0), optim=dict(warmup_steps=1))
    setup = build_train_setup(e)
    whole = "\n".join(corpus.iter_documents("pydoc", e.data))
    text = whole * round(MEGABYTES * 1e6 / len(whole.encode()) + 0.5)
    kinds = [ByteTokenizer(), CharTokenizer("".join(sorted(set(whole))), False), setup.store.tokenizer]
    kinds += [BPETokenizer.from_path(options.bpe)] if options.bpe else []
    found = {tokenizer.kind: speed(tokenizer, text) for tokenizer in kinds}
    for kind, rate in found.items():
        print(f"{kind}: {rate / 1e6:.1f} MB/s")
    alone = DataLoader(setup.store, setup.experiment, make_objective(setup.experiment))
    began = time.perf_counter()
    for step in range(300):
        alone.device_batch(step, setup.mesh)
    each = (time.perf_counter() - began) / 300
    with tempfile.TemporaryDirectory() as folder:
        figures = train.train(e, Path(folder) / "run")
    step_seconds = figures["seconds"] / (steps - 1)
    print(f"a batch, made alone: {each * 1e3:.2f} ms, {setup.batches.tokens_per_step / each:,.0f} tokens/s")
    loader = setup.batches.tokens_per_step / each / (setup.batches.tokens_per_step / step_seconds)
    print(f"{step_seconds * 1e3:.1f} ms/step; making its batch alone is {each / step_seconds:.2%} of it")
    print(f"in the run: batches took {figures['data_work_share']:.2%} of the step time in their thread, "
          f"steps waited {figures['data_wait_share']:.2%} of it for them")  # fmt: skip
    if options.json:
        print(json.dumps(found | {"loader_over_step": loader}))


if __name__ == "__main__":
    main()
