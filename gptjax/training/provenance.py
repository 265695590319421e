"""How a run came about: versions, devices and data (provenance.json), and what changed when it was resumed."""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gptjax.atomic_io import write_atomic
from gptjax.config import Experiment, diff
from gptjax.data.batches import DataPosition
from gptjax.data.store import Store
from gptjax.environment import differences, environment
from gptjax.errors import RunError, warn
from gptjax.inference.pretrained import Pretrained
from gptjax.training.run import (
    EXPERIMENT,
    FORMAT_VERSION,
    METRICS,
    PROVENANCE,
    RESULT,
    Run,
    is_scratch,
    open_run,
    write_generation,
)

# what the privacy accountant assumes to be the same for the whole run
PRIVACY_FIELDS = ("optim.noise_multiplier", "optim.clip_norm", "train.batch_size", "model.context_length", "data")
Changes = dict[str, tuple[Any, Any]]  # dotted field, or "data" -> (value in the run, value now)


def start_run(
    folder: Path,
    experiment: Experiment,
    store: Store,
    allow_changes: bool = False,
    init: Callable[[], Pretrained] | None = None,
    reference: str | None = None,
) -> Changes:
    """Creates the run folder of a resolved experiment, or returns how an existing one differs from it.

    A new run keeps the generation settings of `init`, the model that it starts from, and the fingerprint of the
    `reference` model if it needs one. The caller holds the lock. Raises `RunError` with the differences unless they are
    allowed.
    """
    for scratch in filter(is_scratch, folder.iterdir()):
        scratch.unlink()  # of a process that was killed while writing
    if not (folder / EXPERIMENT).exists():
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        store.tokenizer.save(folder / "tokenizer")
        if init is not None and any(init().generation_settings().values()):
            write_generation(folder, init())
        extra = {"reference": reference} if reference else {}
        write_atomic(folder / PROVENANCE, json.dumps(new_provenance(store.key) | extra, indent=2) + "\n")
        write_atomic(folder / EXPERIMENT, experiment.to_json())  # written last: now it is a run
        return {}
    run = open_run(folder)
    key = run.data_key()
    changes = diff(run.experiment, experiment)
    if key != store.key:
        changes["data"] = (key, store.key)
    before = run.provenance().get("reference")
    if reference and before and before != reference:
        changes["reference"] = (before, reference)
    if changes and not allow_changes:
        raise RunError(
            f"{folder}: holds another experiment; use the same values, choose another --run-dir, or resume with the "
            "new values with --allow-changes:\n" + "\n".join(format_changes(changes))
        )
    if changes or run.result() is None:
        _note_environment(run)
    private = any(e.optim.noise_multiplier is not None for e in (run.experiment, experiment))
    changed = [path for path in PRIVACY_FIELDS if path in changes]
    if private and changed:
        raise RunError(
            f"{folder}: the privacy accountant assumes one noise, batch size, context and text for the whole run, so "
            f"{', '.join(changed)} cannot change; choose another --run-dir"
        )
    if run.tokenizer().id_to_bytes != store.tokenizer.id_to_bytes:
        raise RunError(
            f"{folder}: was trained with another tokenizer, so its ids mean other text; choose another --run-dir"
        )
    return changes


def _note_environment(run: Run) -> None:
    """Warns if the run is resumed with other versions, devices or settings of jax than before, and records them."""
    provenance = run.provenance()
    later = [x for x in provenance.get("environments", []) if isinstance(x, dict)]
    now = environment()
    if found := differences(provenance | (later[-1] if later else {}), now):
        shown = "; ".join(found)
        warn(f"{run.folder}: resumes in another environment, so bits may differ from an uninterrupted run's: {shown}")
        entry = {"when": datetime.now(UTC).isoformat(timespec="seconds")} | now
        provenance["environments"] = [*later, entry]
        write_atomic(run.folder / PROVENANCE, json.dumps(provenance, indent=2) + "\n")


def format_changes(changes: Changes) -> list[str]:
    """One line per change."""
    named = {
        "data": "data (SHA-256 of text, tokenizer and split)",
        "reference": "weights of the reference model (SHA-256)",
    }
    return [f"  - {named.get(path, path)}: {old!r} in the run, {new!r} now" for path, (old, new) in changes.items()]


def accept_changes(run: Run, experiment: Experiment, store: Store, changes: Changes, position: DataPosition) -> None:
    """The run continues with this experiment from this position; provenance.json records what changed, and when."""
    provenance = run.provenance()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    change = {
        "when": now,
        "step": position.step,
        "samples": position.samples,
        "tokens": position.tokens,
        "fields": changes,
    }
    provenance["changes"] = [*provenance.get("changes", []), change]
    now_used = {"data": store.key} | ({"reference": changes["reference"][1]} if "reference" in changes else {})
    write_atomic(run.folder / PROVENANCE, json.dumps(provenance | now_used, indent=2) + "\n")
    write_atomic(run.folder / EXPERIMENT, experiment.to_json())


def quarantine_later(run: Run, step: int) -> None:
    """Keeps the metrics of a run that resumes from an earlier step, or with changes, under other names."""
    for name in (METRICS, RESULT):
        path = run.folder / name
        if path.exists():
            number = 1
            while (kept := path.with_stem(f"{path.stem}-before-step-{step}-again-{number}")).exists():
                number += 1
            shutil.copy2(path, kept) if name == METRICS else path.rename(kept)


def new_provenance(data: str | None) -> dict[str, Any]:
    """The versions, devices, command and data of a run folder that is created now."""
    return {
        "format": FORMAT_VERSION,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": _commit(),
        "data": data,
        "python": platform.python_version(),
    } | environment()


def _commit() -> str | None:
    """The git commit of the source, with "+" if there are uncommitted changes; None outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
        return f"{head}+" if changed else head
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
