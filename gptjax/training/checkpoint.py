"""Checkpoints: Orbax writes and reshards the arrays, gptjax verifies them. No other file uses Orbax.

checkpoints/00000500/arrays/         what Orbax wrote
checkpoints/00000500/manifest.json   step, validation loss, position in the data; size and SHA-256 of every file
checkpoints/00000500/committed       SHA-256 of the manifest: written last, when everything else is on disk
checkpoints/set-aside/               quarantine: damaged checkpoints, and those after the step of a rollback

A folder without `committed` is not a checkpoint. A checkpoint that does not match its manifest is never loaded.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.atomic_io import digest, read_json, read_text, sync_folder, sync_tree, write_atomic
from gptjax.data.batches import DataPosition
from gptjax.errors import EXIT_FAILED, RunError, TrainingFailed, warn
from gptjax.training.state import TrainState, Weights, leaf_name

FORMAT_VERSION = 2
ARRAYS, MANIFEST, COMMITTED, QUARANTINE = "arrays", "manifest.json", "committed", "set-aside"
NOTE_1 = "checkpoint.json"  # in format 1 (release 0.1.0): manifest and marker in one
DELETING = ".deleting"
UNREAD = ...  # stands for an array that is not read; Orbax defines it


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint on disk."""

    folder: Path
    step: int
    format: int = FORMAT_VERSION
    val_loss: float | None = None  # of exactly this step, if it was evaluated
    position: DataPosition | None = None  # in the data; not recorded in format 1
    files: dict[str, tuple[int, str]] = field(default_factory=dict)  # path below `arrays` -> bytes, SHA-256
    damage: str | None = None  # the problem, if the manifest itself is damaged


class LaterFormat(RunError):
    """A checkpoint from a later release: it is not damaged, and must not be quarantined."""


def listing(folder: Path) -> list[Checkpoint]:
    """The committed checkpoints of a run, oldest first, including damaged ones."""
    found = (_read(path) for path in _step_folders(folder) if _is_committed(path))
    return sorted((c for c in found if c is not None), key=lambda c: c.step)


def problem(checkpoint: Checkpoint) -> str | None:
    """The first damage of a checkpoint, with its file; None if every checksum matches."""
    try:
        return checkpoint.damage or _difference(checkpoint)
    except OSError as e:
        return f"{e.filename or checkpoint.folder}: cannot be read ({e.strerror})"


def _difference(checkpoint: Checkpoint) -> str | None:
    arrays = checkpoint.folder / ARRAYS
    if not checkpoint.files:
        return f"{checkpoint.folder / MANIFEST}: names no files"
    there = set(_files(arrays))
    for name, (size, expected) in checkpoint.files.items():
        path = arrays / name
        if name not in there:
            return f"{path}: is missing, or is not a plain file of the checkpoint"
        if path.stat().st_size != size:
            return f"{path}: has {path.stat().st_size:,} bytes instead of {size:,}"
        if digest(path) != expected:
            return f"{path}: was changed (its SHA-256 differs)"
    if unknown := sorted(there - checkpoint.files.keys()):
        return f"{arrays / unknown[0]}: is not in the manifest"
    return None


def choose(folder: Path, which: str = "last") -> Checkpoint:
    """The checkpoint called "last", "best" (lowest validation loss) or by its step, with every checksum verified.

    If the last one is damaged, falls back to an earlier one with a warning. Raises `RunError` if there is none.
    """
    checkpoints = listing(folder)
    if not checkpoints:
        raise RunError(f"{folder}: has no checkpoint yet; train the run first")
    if which == "last":
        return _newest_intact(folder, checkpoints, lambda c, why: warn(f"step {c.step} cannot be used: {why}"))
    wanted = str([*_from_the_best(checkpoints), checkpoints[-1]][0].step) if which == "best" else which
    for checkpoint in checkpoints:
        if wanted == str(checkpoint.step):
            if why := problem(checkpoint):
                raise RunError(
                    f"step {checkpoint.step} cannot be used: {why}; --checkpoint last uses the newest intact checkpoint"
                )
            return checkpoint
    steps = ", ".join(str(c.step) for c in checkpoints)
    raise RunError(f"{folder}: has no checkpoint {which!r}; choose last, best or one of the steps {steps}")


def choose_to_resume(folder: Path, step: int | None = None) -> Checkpoint | None:
    """The checkpoint that a run resumes from: the newest intact one, or that of `step`; None at the beginning.

    The caller holds the run's lock. Removes unfinished saves and deletions and quarantines damaged checkpoints, with
    warnings. Raises `RunError` if no intact checkpoint is left.
    """
    clean_up(folder)
    checkpoints = listing(folder)
    if step is not None:
        chosen = next((c for c in checkpoints if c.step == step), None)
        if step > 0 and chosen is None:
            steps = ", ".join(str(c.step) for c in checkpoints) or "none"
            raise RunError(f"{folder}: has no checkpoint of step {step} to roll back to; there are {steps}")
        if chosen and (why := problem(chosen)):
            raise RunError(f"step {step} cannot be used: {why}; roll back to another")
        return chosen
    if not checkpoints and not any((folder / QUARANTINE).glob("*-damaged*")):
        return None
    return _newest_intact(
        folder, checkpoints, lambda c, why: _quarantine(c.folder, "damaged", f"step {c.step} cannot be used: {why}")
    )


def quarantine_after(folder: Path, step: int) -> None:
    """Quarantines the checkpoints after `step`, with warnings: the run is rolled back."""
    for c in reversed(listing(folder)):
        if c.step > step:
            _quarantine(c.folder, f"rolled-back-to-{step}", f"step {c.step}: the run is rolled back to step {step}")


def unfinished(folder: Path) -> Iterator[tuple[Path, str]]:
    """Paths among the checkpoints that are not checkpoints, each with the reason."""
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        if path.name == QUARANTINE:
            continue
        if path.name.endswith(DELETING):
            yield path, "its deletion was interrupted"
        elif path not in _step_folders(folder):
            yield path, "does not belong to gptjax"
        elif not _is_committed(path):
            yield path, "was never committed, or its marker is missing"


def clean_up(folder: Path) -> None:
    """Removes unfinished saves and deletions, with warnings. Folders with a manifest are quarantined instead."""
    for path, why in list(unfinished(folder)):
        if path.name.endswith(DELETING):
            shutil.rmtree(path, ignore_errors=True)
        elif path not in _step_folders(folder):
            warn(f"{path}: {why}; it is left as it is")
        elif (path / MANIFEST).exists():
            _quarantine(path, "uncommitted", f"{path.name}: {why}")
        else:
            warn(f"{path}: {why}; it is not a checkpoint, and is removed")
            shutil.rmtree(path)


def saved_arrays(checkpoint: Checkpoint) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted name -> shape and dtype of every array in a checkpoint, without reading the arrays.

    Raises `RunError` if the stored chunks of an array are larger than the array: they could take any amount of memory.
    """
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        tree = reader.metadata(checkpoint.folder / ARRAYS).item_metadata.tree
    found = {}
    for leaf in jax.tree.leaves(tree):
        chunks = leaf.storage.chunk_shape if leaf.storage else None
        if chunks and any(chunk > max(size, 1) for chunk, size in zip(chunks, leaf.shape, strict=True)):
            raise RunError(f"{checkpoint.folder}: {leaf.name} of shape {leaf.shape} is stored in chunks of {chunks}")
        found[leaf.name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return found


def restore(checkpoint: Checkpoint, abstract: Any) -> Any:
    """The arrays of a verified checkpoint, with the shardings of `abstract`, which has the structure of the saved tree.

    `UNREAD` leaves are not read and are returned as they are.
    """
    import orbax.checkpoint as ocp

    def restore_args(x: Any) -> Any:
        if x is UNREAD:
            return ocp.RestoreArgs()
        return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)

    args = ocp.args.PyTreeRestore(abstract, restore_args=jax.tree.map(restore_args, abstract))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(checkpoint.folder / ARRAYS, args=args)


class CheckpointWriter:
    """Saves in the background, keeps the last and the best, and raises the error of a failed save at the next call.

    A process that exits without `close` finishes its save first (Python 3.11), or reports it and exits with code 3.
    """

    def __init__(self, folder: Path, keep_last: int, keep_best: int):
        import orbax.checkpoint as ocp

        self.folder, self.keep_last, self.keep_best = folder, keep_last, keep_best
        self.checksum_seconds = 0.0  # time for all checksums so far, in the background
        self._newest = max((c.step for c in listing(folder)), default=-1)
        self._args = ocp.args.StandardSave
        self._arrays = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        _before_threads_end(weakref.WeakMethod(self._at_exit))

    def save(self, state: TrainState | Weights, position: DataPosition, val_loss: float | None = None) -> None:
        """Starts to save this state, unless its step is already saved; returns when the arrays have been copied.

        Raises `TrainingFailed`, and saves nothing, if a number in it is not finite.
        """
        self.wait()
        step = int(state.step)
        if step == self._newest:
            return
        if step < self._newest:
            raise TrainingFailed(
                f"{self.folder}: already holds step {self._newest}; the earlier step {step} is not saved"
            )
        self._check_finite(state, step)
        target = self.folder / f"{step:08d}"
        if jax.process_index() == 0 and target.exists():
            shutil.rmtree(target)  # from a failed save, never committed
        self._newest = step
        try:
            self._arrays.save(target / ARRAYS, args=self._args(state))
        except (OSError, ValueError) as e:
            raise self._failed(e) from e
        self._saving = self._thread.submit(self._commit, target, position, val_loss)

    def wait(self) -> None:
        """Waits for the save in flight; raises `TrainingFailed` if it failed."""
        saving = self._saving
        self._saving = None
        if saving is None:
            return
        try:
            saving.result()
        except Exception as e:
            raise self._failed(e) from e

    def _failed(self, e: Exception) -> TrainingFailed:
        return TrainingFailed(
            f"{self.folder}: step {self._newest} could not be saved ({_first_line(e)}); the other checkpoints are "
            "intact. Free some space or repair the disk; the same command resumes from the last of them"
        )

    def check(self) -> None:
        """Raises `TrainingFailed` if a save has failed, without waiting."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def close(self) -> None:
        """Waits for the last save, then ends the threads."""
        try:
            self.wait()
        finally:
            self._arrays.close()
            self._thread.shutdown()

    def _at_exit(self) -> None:
        try:
            self.wait()
        except TrainingFailed as e:
            print(e, file=sys.stderr, flush=True)
            os._exit(EXIT_FAILED)  # the only way for an exit handler to change the exit code

    def _check_finite(self, state: TrainState | Weights, step: int) -> None:
        names = [leaf_name(path) for path, _ in jax.tree.leaves_with_path(state)]
        finite = np.asarray(jax.jit(_finite_leaves, out_shardings=state.step.sharding)(state))
        if bad := [name for name, good in zip(names, finite, strict=True) if not good]:
            raise TrainingFailed(
                f"step {step}: {bad[0]} (and {len(bad) - 1} others) of the state are not finite; "
                "the step is not saved. Earlier checkpoints are intact; lower optim.learning_rate"
            )

    def _commit(self, target: Path, position: DataPosition, val_loss: float | None) -> None:
        """Writes the manifest and the marker after Orbax has renamed everything, then removes old checkpoints.

        Orbax calls its `post_finalization_callback` before the rename, when the files are not in place yet.
        """
        self._arrays.wait_until_finished()
        if jax.process_index() != 0:
            return
        began = time.perf_counter()
        arrays = target / ARRAYS
        sync_tree(target)  # Orbax leaves some of its files in the page cache
        files = {name: ((arrays / name).stat().st_size, digest(arrays / name)) for name in _files(arrays)}
        self.checksum_seconds += time.perf_counter() - began
        values = {"format": FORMAT_VERSION, "val_loss": val_loss, "place": position.to_json(), "files": files}
        manifest = json.dumps(values, indent=1) + "\n"
        write_atomic(target / MANIFEST, manifest)
        sync_folder(self.folder)
        write_atomic(target / COMMITTED, _marker(manifest))
        self._prune()

    def _prune(self) -> None:
        checkpoints = listing(self.folder)
        kept = {c.step for c in [*checkpoints[-self.keep_last :], *_from_the_best(checkpoints)[: self.keep_best]]}
        for checkpoint in checkpoints:
            if checkpoint.step not in kept:
                doomed = checkpoint.folder.with_name(checkpoint.folder.name + DELETING)
                try:
                    checkpoint.folder.rename(doomed)  # atomic: a listed checkpoint is never half deleted
                    sync_folder(self.folder)
                    shutil.rmtree(doomed)
                except OSError as e:  # the save has succeeded; the rest is removed at the next start
                    warn(f"{doomed}: could not be removed ({e.strerror})")


def state_bytes(abstract: Any) -> int:
    """The size of the arrays of a state, which is about the size of its checkpoint on disk."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))


def _from_the_best(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Checkpoints with a validation loss, lowest first. Only those with the text and context length of the newest."""
    orders = [c.position.order_id if c.position else "" for c in checkpoints]
    same = [c for c, order in zip(checkpoints, orders, strict=True) if order == orders[-1] and c.val_loss is not None]
    return sorted(same, key=lambda c: c.val_loss or 0.0)


def _newest_intact(
    folder: Path, checkpoints: list[Checkpoint], on_damage: Callable[[Checkpoint, str], None]
) -> Checkpoint:
    for checkpoint in reversed(checkpoints):
        why = problem(checkpoint)
        if why is None:
            if checkpoint is not checkpoints[-1]:
                warn(f"falling back to step {checkpoint.step}, the newest intact checkpoint")
            return checkpoint
        if checkpoint.folder.exists():  # else the run has removed it in the meantime
            on_damage(checkpoint, why)
    raise RunError(
        f"{folder}: no intact checkpoint is left to resume from ({folder / QUARANTINE} has the damaged ones); "
        "restore one from a copy, or train in another --run-dir"
    )


def _quarantine(path: Path, reason: str, message: str) -> None:
    number = 1
    while (target := path.parent / QUARANTINE / f"{path.name}-{reason}{f'-{number}' if number > 1 else ''}").exists():
        number += 1
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    sync_folder(path.parent)
    warn(f"{message}; it is moved to {target}")


def _step_folders(folder: Path) -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else iter(())
    return [path for path in paths if re.fullmatch(r"\d{8,}", path.name) and path.is_dir() and not path.is_symlink()]


def _is_committed(path: Path) -> bool:
    return (path / COMMITTED).exists() or (path / NOTE_1).exists()


def _marker(manifest: str) -> str:
    return f"sha256 {hashlib.sha256(manifest.encode()).hexdigest()}\n"


def _read(folder: Path) -> Checkpoint | None:
    """Reads the manifest; None if the checkpoint has just been removed. Raises `LaterFormat` for a later format."""
    step = int(folder.name)
    try:
        values = _verified_manifest(folder)
        version = values["format"]
        if version not in (1, FORMAT_VERSION):
            raise LaterFormat(
                f"{folder}: is a checkpoint of format {version}, and this gptjax reads 1 and {FORMAT_VERSION}; use the "
                "release that wrote it, or a newer one"
            )
        position = DataPosition.from_json(values["place"]) if "place" in values else None
        if step != (position.step if position else values["step"]):
            raise ValueError("its step differs from the name of its folder")
        files = {str(name): (int(size), str(sha)) for name, (size, sha) in values["files"].items()}
        return Checkpoint(folder, step, version, values["val_loss"], position, files)
    except LaterFormat:
        raise
    except FileNotFoundError as e:
        return Checkpoint(folder, step, damage=f"{e.filename}: is missing") if _is_committed(folder) else None
    except (RunError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
        return Checkpoint(folder, step, damage=f"{folder / MANIFEST}: does not match its marker ({_first_line(e)})")


def _verified_manifest(folder: Path) -> dict[str, Any]:
    if (folder / NOTE_1).exists():
        return read_json(folder / NOTE_1)
    text = read_text(folder / MANIFEST)
    if read_text(folder / COMMITTED) != _marker(text):
        raise ValueError("its SHA-256 differs")
    return json.loads(text)


def _files(arrays: Path) -> list[str]:
    """The relative names of the plain files below a folder; links are neither listed nor followed."""
    found = []
    for root, _, names in os.walk(arrays):
        paths = (Path(root, name) for name in names)
        found += [str(path.relative_to(arrays)) for path in paths if path.is_file() and not path.is_symlink()]
    return sorted(found)


def _before_threads_end(action: weakref.WeakMethod[Callable[[], None]]) -> None:
    """Calls `action`, if its object still exists, when the interpreter exits but its thread pools still work.

    `atexit` handlers run too late: Orbax can then start no more threads, and a save in flight is lost. From Python 3.12
    on this may happen here too, unless Orbax has started all its threads; `action` then reports the loss and fails.
    """
    threading._register_atexit(lambda: (call := action()) and call())  # type: ignore[attr-defined]


def _finite_leaves(state: TrainState | Weights) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state)])


def _first_line(e: Exception) -> str:
    line = (str(e) or type(e).__name__).splitlines()[0]
    return line if len(line) < 300 else f"{line[:120]} ... {line[-160:]}"
