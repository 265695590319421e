"""Run folders written in a moment, with figures to choose: as training leaves them, but for the weights."""

import json
from pathlib import Path

from conftest import TINY

from gptjax.config import Experiment
from gptjax.lab.trials import trials_of, write_sweep

BASE = TINY.override(model=dict(vocab_size=50)).resolved(50)


def make_run(
    folder: Path, e: Experiment, val_loss: float | None, *, finished: bool = True, data="text", **more
) -> Path:
    """A run whose loss falls to `val_loss`; `more`: figures of result.json, and `provenance`, `samples`, `looks`."""
    folder.mkdir(parents=True)
    looks = more.pop("looks", (3, 6))  # steps with a look at the validation text
    devices = {"count": 1, "kind": "cpu", "platform": "cpu"}
    provenance = {"format": 1, "started": "2026-01-02T03:04:05+00:00", "data": data, "commit": "abc"}
    provenance |= {"python": "3.11.0", "versions": {"jax": "0.10.2"}, "devices": devices}
    (folder / "provenance.json").write_text(json.dumps(provenance | more.pop("provenance", {})))
    (folder / "experiment.json").write_text(e.resolved(50).to_json())
    (folder / "samples.txt").write_text(more.pop("samples", "--- sample 1 ---\na text\n"))
    end = 3.0 if val_loss is None else val_loss
    lines = [{"step": s, "loss": end + 1 / s} for s in range(1, 7)]
    lines += [{"step": s, "val_loss": loss} for s, loss in ((3, end + 0.3), (6, end)) if s in looks]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines if finished or x["step"] < 4))
    bits = None if val_loss is None else val_loss / 2
    result = {"format": 1, "val_loss": val_loss, "val_bits_per_byte": bits, "val_bytes": 900, "steps": 6, "tokens": 768,
              "tokens_per_second": 1000.0, "seconds": 0.7, "num_params": 1234, "memory_bytes": 5e8}  # fmt: skip
    if finished:
        (folder / "result.json").write_text(json.dumps(result | more))
    return folder


def make_sweep(folder: Path, losses: dict[str, list[float]], **changes) -> Path:
    """A sweep with a variant for each name, of different learning rates, and seeds 0, 1, ... with these losses."""
    variants = [BASE.override({"name": name, "optim.learning_rate": 10.0 ** -(i + 2)}) for i, name in enumerate(losses)]
    trials = trials_of(variants, max(map(len, losses.values())), folder)
    write_sweep(folder, trials)
    for t in trials:
        if t.seed < len(losses[t.variant]):
            make_run(t.folder, t.experiment, losses[t.variant][t.seed], **changes)
    return folder
