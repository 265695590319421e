"""Checkpoints: Orbax writes and reshards the arrays, a note written last vouches for them. No other file knows Orbax.

`checkpoints/00000500/arrays/` is Orbax's; `checkpoint.json` beside it holds the step, the validation loss, and the size
and SHA-256 of every file, and appears only when they are all on disk. What has no such note, or does not match it, is
not a checkpoint.
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from gptjax.errors import RunError, TrainingFailed
from gptjax.training.state import TrainState

FORMAT_VERSION = 1
NOTE = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """A vouched-for checkpoint on disk."""

    folder: Path
    step: int
    val_loss: float | None  # of this very step, where it was evaluated
    files: dict[str, tuple[int, str]]  # path below `arrays` -> bytes, SHA-256


def listing(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a run, oldest first."""
    found = []
    for note in sorted(folder.glob(f"*/{NOTE}")):
        values = json.loads(note.read_text())
        if values["format"] != FORMAT_VERSION:
            raise RunError(f"{note}: has format {values['format']}; this gptjax reads {FORMAT_VERSION}")
        files = {name: (size, digest) for name, (size, digest) in values["files"].items()}
        found.append(Checkpoint(note.parent, values["step"], values["val_loss"], files))
    return found


def choose(folder: Path, which: str = "last") -> Checkpoint:
    """The checkpoint called "last", "best" (lowest validation loss) or by its step. Raises `RunError` for none such."""
    checkpoints = listing(folder)
    if not checkpoints:
        raise RunError(f"{folder}: has no checkpoint yet; train the run first")
    if which == "last":
        return checkpoints[-1]
    if which == "best":
        evaluated = [c for c in checkpoints if c.val_loss is not None]
        return min(evaluated, key=lambda c: c.val_loss or 0.0) if evaluated else checkpoints[-1]
    for checkpoint in checkpoints:
        if which == str(checkpoint.step):
            return checkpoint
    steps = ", ".join(str(c.step) for c in checkpoints)
    raise RunError(f"{folder}: has no checkpoint {which!r}; there are last, best and the steps {steps}")


def restore(checkpoint: Checkpoint, abstract: Any) -> Any:
    """The state, laid out as `abstract` says. Raises `RunError` where a file is not what was written."""
    import orbax.checkpoint as ocp

    verify(checkpoint)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        try:
            return reader.restore(checkpoint.folder / "arrays", args=ocp.args.StandardRestore(abstract))
        except ValueError as e:
            raise RunError(f"{checkpoint.folder}: does not hold the state of this experiment: {e}") from None


def verify(checkpoint: Checkpoint) -> None:
    """Raises `RunError` naming the first file that is missing or differs from what was written."""
    arrays = checkpoint.folder / "arrays"
    if not checkpoint.files:
        raise RunError(f"{checkpoint.folder}: its {NOTE} names no files; the checkpoint cannot be used, remove it")
    for name, (size, digest) in checkpoint.files.items():
        path = arrays / name
        if not path.is_file():
            raise RunError(f"{path}: is missing; the checkpoint cannot be used, remove {checkpoint.folder}")
        if path.stat().st_size != size or _digest(path) != digest:
            raise RunError(
                f"{path}: is not what was written; the checkpoint cannot be used, remove {checkpoint.folder}"
            )


class Writer:
    """Saves in the background, keeps the last and the best, and raises what went wrong with a save at the next call."""

    def __init__(self, folder: Path, keep_last: int, keep_best: int):
        import orbax.checkpoint as ocp

        self.folder, self.keep_last, self.keep_best = folder, keep_last, keep_best
        self._newest = max((c.step for c in listing(folder)), default=-1)
        self._args = ocp.args.StandardSave
        self._arrays = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None

    def save(self, state: TrainState, val_loss: float | None = None) -> None:
        """Starts saving this state, unless its step is saved already; returns when the arrays have been copied."""
        self.wait()
        step = int(state.step)
        if step == self._newest:
            return
        target = self.folder / f"{step:08d}"
        if jax.process_index() == 0 and target.exists():
            shutil.rmtree(target)  # left by a save that was cut off: nothing vouches for it
        self._arrays.save(target / "arrays", args=self._args(state))
        self._saving = self._thread.submit(self._commit, target, step, val_loss)
        self._newest = step

    def wait(self) -> None:
        """Returns when nothing is in flight; raises `TrainingFailed` where the last save failed."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except Exception as e:
            raise TrainingFailed(
                f"{self.folder}: step {self._newest} could not be saved ({e}); the others are whole. Make room "
                "or mend the disk; the same command goes on from the last of them"
            ) from e

    def close(self) -> None:
        """Waits for the last save, then lets the threads go."""
        try:
            self.wait()
        finally:
            self._arrays.close()
            self._thread.shutdown()

    def _commit(self, target: Path, step: int, val_loss: float | None) -> None:
        """When Orbax has written and renamed everything: vouch for it, then tidy up.

        Orbax's own `post_finalization_callback` is called before the rename, when there is nothing to vouch for yet.
        """
        self._arrays.wait_until_finished()
        if jax.process_index() != 0:
            return
        arrays = target / "arrays"
        paths = [path for path in sorted(arrays.rglob("*")) if path.is_file()]
        files = {str(path.relative_to(arrays)): (path.stat().st_size, _digest(path)) for path in paths}
        note = {"format": FORMAT_VERSION, "step": step, "val_loss": val_loss, "files": files}
        write_durably(target / NOTE, json.dumps(note, indent=1) + "\n")
        self._prune()

    def _prune(self) -> None:
        checkpoints = listing(self.folder)
        evaluated = sorted((c for c in checkpoints if c.val_loss is not None), key=lambda c: c.val_loss or 0.0)
        kept = {c.step for c in [*checkpoints[-self.keep_last :], *evaluated[: self.keep_best]]}
        for checkpoint in checkpoints:
            if checkpoint.step not in kept:
                (checkpoint.folder / NOTE).unlink()  # first, so that no listed checkpoint is ever half deleted
                shutil.rmtree(checkpoint.folder)


def write_durably(path: Path, text: str) -> None:
    """Replaces a file so that, whatever happens, either the old or the new content is there."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
