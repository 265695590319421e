"""Kills training runs with SIGKILL, again and again, and counts what was lost: nothing may be.

    python benchmarks/kill_campaign.py --kills 50 [--fine-tuning]

Every run is killed at random moments: anywhere between start and work, amid a save, amid a delete. After each kill
every listed checkpoint is compared with its checksums, and the newest with the same step of an unbroken run, bit for
bit; then the same command resumes it. At the end state, losses and metrics must equal the unbroken run's. Exits with 1
where anything was corrupted, lost or different.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from gptjax.config import Experiment
from gptjax.sharding import one_device
from gptjax.training import checkpoint
from gptjax.training.restore import restore_state
from gptjax.training.run import open_run
from gptjax.training.train_setup import build_train_setup

MOMENTS = ["random", "start", "save", "delete"]


def experiment(folder: Path, steps: int) -> Experiment:
    """Saves after every other step, and deletes as often; dropout, accumulation, averages and a mixture are on."""
    for name, size in (("a", 400), ("b", 200)):
        (folder / f"{name}.txt").write_text("".join(f"line {i} of {name} is {i * i % 97}\n" for i in range(size)))
    return Experiment(name="campaign").override(
        model=dict(context_length=16, num_layers=2, embed_dim=32, num_heads=2, dropout=0.1),
        data=dict(source=(str(folder / "a.txt"), str(folder / "b.txt"))),
        optim=dict(warmup_steps=2, learning_rate=1e-2, ema_decay=0.9),
        train=dict(steps=steps, batch_size=8, microbatches=2, checkpoint_every=2, eval_every=10, log_every=1,
                   keep_last=2, sample_tokens=0),
    )  # fmt: skip


def tuned(folder: Path, e: Experiment) -> Experiment:
    """Fine-tuning, from a run of `first` in the folder: LoRA, on a table, its answers alone."""
    rows = [{"number": i, "rest": i * i % 97} for i in range(400)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dict(source=str(folder / "rows.jsonl"), prompt="{number} is ", answer="{rest}", tokenizer="init")
    return e.override(init=str(folder / "first"), model=dict(lora_rank=2), data=data, objective=dict(name="sft"))


@dataclass
class Campaign:
    """What all runs share: the unbroken run, and the counts."""

    folder: Path
    steps: int
    draw: random.Random
    fine_tuning: bool
    counts: Counter = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)  # restoring is done by one thread at a time

    def build_train_setup(self) -> None:
        """The unbroken run, which keeps every checkpoint; the others keep two."""
        e = experiment(self.folder, self.steps)
        if self.fine_tuning:
            self.finish("first", e.override({"train.steps": 10}))
            e = tuned(self.folder, e)
        self.setup = build_train_setup(e, one_device())
        self.write("killed", e)
        self.finish("unbroken", e.override({"train.keep_last": self.steps}))
        self.expected = self.ending(self.folder / "unbroken")

    def write(self, name: str, e: Experiment) -> None:
        (self.folder / f"{name}.py").write_text(
            f"from gptjax.config import Experiment\n\nexperiment = Experiment.from_json({e.to_json()!r})\n"
        )

    def finish(self, name: str, e: Experiment) -> None:
        """A run that nobody disturbs."""
        self.write(name, e)
        process = self.start(name, self.folder / name)
        _, errors = process.communicate()
        assert process.returncode == 0, errors

    def start(self, name: str, run: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "gptjax", "train", str(self.folder / f"{name}.py"), "--run-dir", str(run)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def state(self, run: Path, found: checkpoint.Checkpoint) -> str:
        """A hash of every bit of the state in a checkpoint."""
        with self.lock:
            state = restore_state(found, self.setup.abstract, self.setup.experiment)
            return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state))).hexdigest()

    def ending(self, run: Path) -> tuple:
        """Everything that a finished run came to: state, losses of all steps, and figures."""
        opened = open_run(run)
        losses = [(line["step"], line.get("loss"), line.get("val_loss")) for line in opened.metrics()]
        figures = opened.result() or {}
        exact = [figures[name] for name in ("val_loss", "best_val_loss", "train_loss", "steps", "tokens", "samples")]
        return self.state(run, checkpoint.choose(opened.checkpoints)), losses, exact

    def examine(self, run: Path, newest: int) -> int:
        """Every checkpoint after a kill: whole, the unbroken run's, and none lost. Returns the newest step."""
        found = checkpoint.listing((run / "checkpoints").absolute())
        for c in found:
            self.counts["checkpoints examined"] += 1
            if why := checkpoint.problem(c):
                self.counts["corruptions"] += 1
                print(f"CORRUPT: {why}")
        if not found:
            self.counts["lost"] += newest > 0
            return newest
        last = found[-1]
        (same,) = [c for c in self.unbroken if c.step == last.step]
        if self.state(run, last) != self.state(run, same):
            self.counts["corruptions"] += 1
            print(f"CORRUPT: {last.folder}: differs from the unbroken run")
        if last.step < newest:
            self.counts["lost"] += 1
            print(f"LOST: {run}: had step {newest}, has step {last.step}")
        return last.step

    def one(self, number: int, kills: int) -> None:
        """One run from nothing to its end, killed `kills` times on the way."""
        run, newest, life = self.folder / f"run{number}", 0, 0
        self.unbroken = checkpoint.listing((self.folder / "unbroken" / "checkpoints").absolute())
        while life < kills:
            moment = MOMENTS[life % len(MOMENTS)]
            process = self.start("killed", run)
            if not self.await_moment(process, run, moment, newest):
                break  # it finished first
            process.send_signal(signal.SIGKILL)
            process.communicate()
            life += 1
            self.counts["kills"] += 1
            self.counts[f"kills: {moment}"] += 1
            newest = self.examine(run, newest)
            print(f"run {number}: kill {life}/{kills} at {moment}, step {newest}", flush=True)
        process = self.start("killed", run)
        _, errors = process.communicate()
        self.counts["resumes"] += life
        if process.returncode != 0:
            self.counts["failed to finish"] += 1
            print(f"FAILED: {run}: {errors}")
        elif self.ending(run) != self.expected:
            self.counts["different ends"] += 1
            print(f"DIFFERENT: {run}")
        else:
            self.counts["equal ends"] += 1

    def await_moment(self, process: subprocess.Popen, run: Path, moment: str, newest: int) -> bool:
        """Returns when it is time to kill; False where the run ended before."""
        with self.lock:
            wait = self.draw.uniform(0, 6) if moment == "start" else self.draw.uniform(0, 1.5)
        folder, began = run / "checkpoints", time.monotonic()
        if moment == "start":
            while process.poll() is None and time.monotonic() < began + wait:
                time.sleep(0.01)
            return process.poll() is None
        while process.poll() is None and not self.has_gone_on(folder, newest):
            time.sleep(0.005)
        began = time.monotonic()
        while process.poll() is None:
            passed = time.monotonic() > began + wait
            names = os.listdir(folder) if passed and moment != "random" else []
            if moment == "random" and passed:
                return True
            if moment == "delete" and any(name.endswith(checkpoint.DELETING) for name in names):
                return True
            if moment == "save" and any(
                name.isdigit() and not (folder / name / "committed").exists() for name in names
            ):
                return True
            time.sleep(0.0002)
        return False

    @staticmethod
    def has_gone_on(folder: Path, newest: int) -> bool:
        names = os.listdir(folder) if folder.exists() else []
        return any(name.isdigit() and int(name) > newest for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--steps", type=int, default=160, help="of each run, with a save after every other")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fine-tuning", action="store_true", help="kill runs that began with another one, with LoRA")
    parser.add_argument("--json", action="store_true", help="print the counts as one JSON object as the last line")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        campaign = Campaign(Path(name), options.steps, random.Random(options.seed), options.fine_tuning)
        campaign.build_train_setup()
        print(f"the unbroken run took {time.monotonic() - began:.0f} s", flush=True)
        shares = [options.kills // options.runs + (i < options.kills % options.runs) for i in range(options.runs)]
        with ThreadPoolExecutor(options.workers) as pool:
            for done in [pool.submit(campaign.one, i, share) for i, share in enumerate(shares)]:
                done.result()
    counts = campaign.counts
    for name in ("corruptions", "lost", "different ends", "failed to finish"):
        counts.setdefault(name, 0)
    moments = ", ".join(f"{counts['kills: ' + m]} {m}" for m in MOMENTS)
    print(f"{counts['kills']} kills ({moments}), "
          f"{counts['resumes']} resumes, {counts['checkpoints examined']} checkpoints examined, "
          f"{counts['corruptions']} corruptions, {counts['lost']} lost; "
          f"{counts['equal ends']} of {options.runs} ends equal to the unbroken run's; "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    if options.json:
        print(json.dumps(counts))
    bad = sum(counts[name] for name in ("corruptions", "lost", "different ends", "failed to finish"))
    sys.exit(1 if bad or counts["equal ends"] != options.runs else 0)


if __name__ == "__main__":
    main()
