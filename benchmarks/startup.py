"""Seconds from the command to the first finished step of the quickstart, cold and with the compilation cache warm.

    python benchmarks/startup.py [--rounds 3]

Cold: an empty cache folder, so the corpus is tokenised and everything is compiled. Warm: the same command again.
"""

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    cold, warm = [], []
    for _ in range(parser.parse_args().rounds):
        with tempfile.TemporaryDirectory() as scratch:
            cold.append(first_step(f"{scratch}/cache", f"{scratch}/cold"))
            warm.append(first_step(f"{scratch}/cache", f"{scratch}/warm"))
    for name, seconds in (("cold", cold), ("warm", warm)):
        print(f"{name}: median {statistics.median(seconds):.1f} s (from {min(seconds):.1f} to {max(seconds):.1f})")


if __name__ == "__main__":
    main()
