"""Checkpoints: Orbax writes and reshards the arrays, gptjax vouches for them. No other file knows Orbax.

checkpoints/00000500/arrays/         what Orbax wrote
checkpoints/00000500/manifest.json   step, validation loss, place in the data; size and SHA-256 of every file
checkpoints/00000500/committed       SHA-256 of the manifest: written last, when all else is on disk
checkpoints/set-aside/               what failed its checksums, or came after a step that the run was taken back to

What has no `committed` is not a checkpoint; what does not match its manifest is never loaded.
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
ARRAYS, MANIFEST, COMMITTED, SET_ASIDE = "arrays", "manifest.json", "committed", "set-aside"
NOTE_1 = "checkpoint.json"  # format 1 (release 0.1.0) had this one file as manifest and marker
DELETING = ".deleting"
UNREAD = ...  # in the place of an array that is not to be read; the word is Orbax's


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint on disk."""

    folder: Path
    step: int
    format: int = FORMAT_VERSION
    val_loss: float | None = None  # of this very step, where it was evaluated
    position: DataPosition | None = None  # in the data; format 1 did not keep it
    files: dict[str, tuple[int, str]] = field(default_factory=dict)  # path below `arrays` -> bytes, SHA-256
    damage: str | None = None  # what is wrong with the manifest itself


class LaterFormat(RunError):
    """A checkpoint that a later release wrote: it is not damaged, and must not be set aside."""


def listing(folder: Path) -> list[Checkpoint]:
    """The committed checkpoints of a run, oldest first, damaged ones among them."""
    found = (_read(path) for path in _step_folders(folder) if _is_committed(path))
    return sorted((c for c in found if c is not None), key=lambda c: c.step)


def problem(checkpoint: Checkpoint) -> str | None:
    """What of a checkpoint is not as it was written, named by its file; None for a whole one."""
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
            return f"{path}: is missing, or no plain file of the checkpoint"
        if path.stat().st_size != size:
            return f"{path}: has {path.stat().st_size:,} bytes, {size:,} were written"
        if digest(path) != expected:
            return f"{path}: is not what was written (its SHA-256 differs)"
    if unknown := sorted(there - checkpoint.files.keys()):
        return f"{arrays / unknown[0]}: is not in the manifest"
    return None


def choose(folder: Path, which: str = "last") -> Checkpoint:
    """The checkpoint called "last", "best" (lowest validation loss) or by its step, with every checksum compared.

    A damaged last one is passed over, which is said on stderr. Raises `RunError` where there is none such.
    """
    checkpoints = listing(folder)
    if not checkpoints:
        raise RunError(f"{folder}: has no checkpoint yet; train the run first")
    if which == "last":
        return _newest_whole(folder, checkpoints, lambda c, why: warn(f"step {c.step} cannot be used: {why}"))
    wanted = str([*_from_the_best(checkpoints), checkpoints[-1]][0].step) if which == "best" else which
    for checkpoint in checkpoints:
        if wanted == str(checkpoint.step):
            if why := problem(checkpoint):
                raise RunError(
                    f"step {checkpoint.step} cannot be used: {why}; --checkpoint last takes the newest whole"
                )
            return checkpoint
    steps = ", ".join(str(c.step) for c in checkpoints)
    raise RunError(f"{folder}: has no checkpoint {which!r}; there are last, best and the steps {steps}")


def choose_to_go_on(folder: Path, step: int | None = None) -> Checkpoint | None:
    """The checkpoint that a run goes on from: the newest whole one, or that of `step`; None at the beginning.

    For the holder of the run's lock: clears away what saves and deletes left unfinished and sets aside what is damaged,
    and says so on stderr. Raises `RunError` where nothing whole is left to go on from.
    """
    tidy(folder)
    checkpoints = listing(folder)
    if step is not None:
        chosen = next((c for c in checkpoints if c.step == step), None)
        if step > 0 and chosen is None:
            steps = ", ".join(str(c.step) for c in checkpoints) or "none"
            raise RunError(f"{folder}: has no checkpoint of step {step} to go back to; there are {steps}")
        if chosen and (why := problem(chosen)):
            raise RunError(f"step {step} cannot be used: {why}; go back to another")
        return chosen
    if not checkpoints and not any((folder / SET_ASIDE).glob("*-damaged*")):
        return None
    return _newest_whole(
        folder, checkpoints, lambda c, why: _set_aside(c.folder, "damaged", f"step {c.step} cannot be used: {why}")
    )


def set_aside_after(folder: Path, step: int) -> None:
    """Sets aside the checkpoints of a future that a run does not have any more, and says so on stderr."""
    for c in reversed(listing(folder)):
        if c.step > step:
            _set_aside(c.folder, f"rolled-back-to-{step}", f"step {c.step}: the run goes back to step {step}")


def unfinished(folder: Path) -> Iterator[tuple[Path, str]]:
    """What lies among the checkpoints and is none, and why."""
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        if path.name == SET_ASIDE:
            continue
        if path.name.endswith(DELETING):
            yield path, "its removal was cut off"
        elif path not in _step_folders(folder):
            yield path, "is not gptjax's"
        elif not _is_committed(path):
            yield path, "was never committed, or its marker is gone"


def tidy(folder: Path) -> None:
    """Clears away what was never a checkpoint, and says so. What has a manifest is set aside instead of removed."""
    for path, why in list(unfinished(folder)):
        if path.name.endswith(DELETING):
            shutil.rmtree(path, ignore_errors=True)
        elif path not in _step_folders(folder):
            warn(f"{path}: {why}; it is left alone")
        elif (path / MANIFEST).exists():
            _set_aside(path, "uncommitted", f"{path.name}: {why}")
        else:
            warn(f"{path}: {why}; it is no checkpoint, and is cleared away")
            shutil.rmtree(path)


def saved_arrays(checkpoint: Checkpoint) -> dict[str, jax.ShapeDtypeStruct]:
    """Dotted name -> shape and dtype of every array in a checkpoint, without reading it.

    Raises `RunError` where the pieces that an array is stored in are larger than itself: they could take any memory.
    """
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        tree = reader.metadata(checkpoint.folder / ARRAYS).item_metadata.tree
    found = {}
    for leaf in jax.tree.leaves(tree):
        pieces = leaf.storage.chunk_shape if leaf.storage else None
        if pieces and any(piece > max(size, 1) for piece, size in zip(pieces, leaf.shape, strict=True)):
            raise RunError(f"{checkpoint.folder}: {leaf.name} of shape {leaf.shape} is stored in pieces of {pieces}")
        found[leaf.name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return found


def restore(checkpoint: Checkpoint, abstract: Any) -> Any:
    """The arrays of a checkpoint that was found whole, laid out as `abstract` says, which has the saved tree.

    Where it has `UNREAD`, nothing is read and the same comes back.
    """
    import orbax.checkpoint as ocp

    def how(x: Any) -> Any:
        if x is UNREAD:
            return ocp.RestoreArgs()
        return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)

    args = ocp.args.PyTreeRestore(abstract, restore_args=jax.tree.map(how, abstract))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(checkpoint.folder / ARRAYS, args=args)


class CheckpointWriter:
    """Saves in the background, keeps the last and the best, and raises what went wrong with a save at the next call.

    A process that ends without `close` finishes its save first (Python 3.11), or says so and ends with exit code 3.
    """

    def __init__(self, folder: Path, keep_last: int, keep_best: int):
        import orbax.checkpoint as ocp

        self.folder, self.keep_last, self.keep_best = folder, keep_last, keep_best
        self.checksum_seconds = 0.0  # spent in the background on all checksums so far
        self._newest = max((c.step for c in listing(folder)), default=-1)
        self._args = ocp.args.StandardSave
        self._arrays = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        _before_threads_end(weakref.WeakMethod(self._at_exit))

    def save(self, state: TrainState | Weights, position: DataPosition, val_loss: float | None = None) -> None:
        """Starts saving this state, unless its step is saved already; returns when the arrays have been copied.

        Raises `TrainingFailed`, and saves nothing, where a number in it is not finite.
        """
        self.wait()
        step = int(state.step)
        if step == self._newest:
            return
        if step < self._newest:
            raise TrainingFailed(
                f"{self.folder}: step {self._newest} is there already; step {step} is not saved beside it"
            )
        self._check_finite(state, step)
        target = self.folder / f"{step:08d}"
        if jax.process_index() == 0 and target.exists():
            shutil.rmtree(target)  # left by a save that failed: it was never committed
        self._newest = step
        try:
            self._arrays.save(target / ARRAYS, args=self._args(state))
        except (OSError, ValueError) as e:
            raise self._failed(e) from e
        self._saving = self._thread.submit(self._commit, target, position, val_loss)

    def wait(self) -> None:
        """Returns when nothing is in flight; raises `TrainingFailed` where the last save failed."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except Exception as e:
            raise self._failed(e) from e

    def _failed(self, e: Exception) -> TrainingFailed:
        return TrainingFailed(
            f"{self.folder}: step {self._newest} could not be saved ({_first_line(e)}); the others are whole. Make "
            "room or mend the disk; the same command goes on from the last of them"
        )

    def check(self) -> None:
        """Raises `TrainingFailed` if a save has failed by now; waits for nothing."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def close(self) -> None:
        """Waits for the last save, then lets the threads go."""
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
            os._exit(EXIT_FAILED)  # an exit handler has no other way to change the exit code

    def _check_finite(self, state: TrainState | Weights, step: int) -> None:
        names = [leaf_name(path) for path, _ in jax.tree.leaves_with_path(state)]
        finite = np.asarray(jax.jit(_finite_leaves, out_shardings=state.step.sharding)(state))
        if bad := [name for name, good in zip(names, finite, strict=True) if not good]:
            raise TrainingFailed(
                f"step {step}: {bad[0]} (and {len(bad) - 1} others) of the state hold numbers that are not finite; "
                "it is not saved. The checkpoints before it are whole; lower optim.learning_rate"
            )

    def _commit(self, target: Path, position: DataPosition, val_loss: float | None) -> None:
        """When Orbax has written and renamed everything: vouch for it, then tidy up.

        Orbax's own `post_finalization_callback` is called before the rename, when there is nothing to vouch for yet.
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
                condemned = checkpoint.folder.with_name(checkpoint.folder.name + DELETING)
                try:
                    checkpoint.folder.rename(condemned)  # at one stroke: what is listed is never half deleted
                    sync_folder(self.folder)
                    shutil.rmtree(condemned)
                except OSError as e:  # the save is done; what is left is cleared away at the next start
                    warn(f"{condemned}: could not be removed ({e.strerror})")


def state_bytes(abstract: Any) -> int:
    """What the arrays of a state take, about what its checkpoint takes on disk."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))


def _from_the_best(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Those with a validation loss, the lowest first; of one text and context length only, those of the newest."""
    orders = [c.position.order_id if c.position else "" for c in checkpoints]
    same = [c for c, order in zip(checkpoints, orders, strict=True) if order == orders[-1] and c.val_loss is not None]
    return sorted(same, key=lambda c: c.val_loss or 0.0)


def _newest_whole(
    folder: Path, checkpoints: list[Checkpoint], on_damage: Callable[[Checkpoint, str], None]
) -> Checkpoint:
    for checkpoint in reversed(checkpoints):
        why = problem(checkpoint)
        if why is None:
            if checkpoint is not checkpoints[-1]:
                warn(f"falling back to step {checkpoint.step}, the newest checkpoint that is whole")
            return checkpoint
        if checkpoint.folder.exists():  # else the run itself has removed it while we looked
            on_damage(checkpoint, why)
    raise RunError(
        f"{folder}: no whole checkpoint is left to go on from ({folder / SET_ASIDE} has what was set aside); "
        "bring one back from a copy, or train in another --run-dir"
    )


def _set_aside(path: Path, reason: str, message: str) -> None:
    number = 1
    while (target := path.parent / SET_ASIDE / f"{path.name}-{reason}{f'-{number}' if number > 1 else ''}").exists():
        number += 1
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    sync_folder(path.parent)
    warn(f"{message}; it is set aside in {target}")


def _step_folders(folder: Path) -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else iter(())
    return [path for path in paths if re.fullmatch(r"\d{8,}", path.name) and path.is_dir() and not path.is_symlink()]


def _is_committed(path: Path) -> bool:
    return (path / COMMITTED).exists() or (path / NOTE_1).exists()


def _marker(manifest: str) -> str:
    return f"sha256 {hashlib.sha256(manifest.encode()).hexdigest()}\n"


def _read(folder: Path) -> Checkpoint | None:
    """What a checkpoint says of itself; None where it has just been removed. Raises `RunError` for a later format."""
    step = int(folder.name)
    try:
        values = _vouched(folder)
        version = values["format"]
        if version not in (1, FORMAT_VERSION):
            raise LaterFormat(
                f"{folder}: is a checkpoint of format {version}, and this gptjax reads 1 and {FORMAT_VERSION}; use the "
                "release that wrote it, or a newer one"
            )
        position = DataPosition.from_json(values["place"]) if "place" in values else None
        if step != (position.step if position else values["step"]):
            raise ValueError("it is of another step than its folder")
        files = {str(name): (int(size), str(sha)) for name, (size, sha) in values["files"].items()}
        return Checkpoint(folder, step, version, values["val_loss"], position, files)
    except LaterFormat:
        raise
    except FileNotFoundError as e:
        return Checkpoint(folder, step, damage=f"{e.filename}: is missing") if _is_committed(folder) else None
    except (RunError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
        return Checkpoint(folder, step, damage=f"{folder / MANIFEST}: is not what was committed ({_first_line(e)})")


def _vouched(folder: Path) -> dict[str, Any]:
    if (folder / NOTE_1).exists():
        return read_json(folder / NOTE_1)
    text = read_text(folder / MANIFEST)
    if read_text(folder / COMMITTED) != _marker(text):
        raise ValueError("its SHA-256 differs")
    return json.loads(text)


def _files(arrays: Path) -> list[str]:
    """The plain files below a folder, by their relative names; links are neither listed nor followed."""
    found = []
    for root, _, names in os.walk(arrays):
        paths = (Path(root, name) for name in names)
        found += [str(path.relative_to(arrays)) for path in paths if path.is_file() and not path.is_symlink()]
    return sorted(found)


def _before_threads_end(action: weakref.WeakMethod[Callable[[], None]]) -> None:
    """Calls `action`, if its object still lives, when the interpreter ends but its thread pools still work.

    Handlers of `atexit` come too late: Orbax can start no more threads then, and a save in flight is lost. From Python
    3.12 on that is so here too, unless Orbax has started all that it needs; what remains is to say so and to fail.
    """
    threading._register_atexit(lambda: (call := action()) and call())  # type: ignore[attr-defined]


def _finite_leaves(state: TrainState | Weights) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state)])


def _first_line(e: Exception) -> str:
    line = (str(e) or type(e).__name__).splitlines()[0]
    return line if len(line) < 300 else f"{line[:120]} ... {line[-160:]}"
