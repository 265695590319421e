"""Does a model know its validation text better than gzip does? Bits a byte of both, on the same text.

    python benchmarks/against_gzip.py runs/quickstart

The model's figure counts every byte but those of the very first token, which nothing precedes.
"""

import argparse
import gzip
import logging
from pathlib import Path

from gptjax.data.store import open_store
from gptjax.training.evaluation import evaluate_run
from gptjax.training.run import open_run
from gptjax.training.train_setup import enable_compilation_cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    logging.getLogger("absl").setLevel(logging.ERROR)
    enable_compilation_cache()
    run = open_run(parser.parse_args().run)
    store = open_store(run.experiment.data)
    text = b"".join(store.tokenizer.decode_bytes(stream.ids) for stream in store.validation)
    packed = 8 * len(gzip.compress(text, 9)) / len(text)
    figures = evaluate_run(run)
    print(f"validation text: {len(text):,} bytes, of which the loss covers {figures['val_bytes']:,}")
    print(f"gzip -9: {packed:.4f} bits/byte")
    print(f"{run.experiment.name}: {figures['val_bits_per_byte']:.4f} bits/byte, step {figures['steps']}")


if __name__ == "__main__":
    main()
