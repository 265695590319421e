"""A folder in Hugging Face's layout, which may be a stranger's: links, pickles, giants and damage are refused.

Weights are read from safetensors only: a header of JSON and the bytes of the arrays. gptjax never unpickles.
"""

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax.numpy as jnp  # with ml_dtypes, which teaches NumPy bfloat16
import numpy as np

from gptjax.atomic_io import read_json, read_text, sync_folder
from gptjax.errors import ExchangeError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION, TOKENIZER, TEMPLATE = "generation_config.json", "tokenizer_config.json", "chat_template.jinja"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
LARGEST_HEADER = 100_000_000  # bytes: that of a model with a million tensors
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]


def check_folder(folder: Path) -> None:
    """Raises `ExchangeError` where a folder holds no model, or links that lead out of it.

    The hub's cache is made of links from `models--NAME/snapshots/REVISION` to `models--NAME/blobs`: they are followed.
    """
    if not folder.is_dir():
        raise ExchangeError(folder, ["is no folder; name one with config.json and model.safetensors"])
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        homes.append(home.parent.parent / "blobs")
    problems = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not any(path.resolve().is_relative_to(h) for h in homes):
            problems.append(f"{path.name} is a link that leads out of the folder; gptjax does not follow it")
        elif path.exists() and not (path.is_file() or path.is_dir()):
            problems.append(f"{path.name} is neither a file nor a folder")
    if problems:
        raise ExchangeError(folder, problems)


def read_object(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in a file of a folder that `check_folder` let pass; None where there is none."""
    path = (folder / name).resolve()
    return read_json(path) if path.is_file() else None


def read_words(folder: Path, name: str) -> str | None:
    """The text of a file of such a folder; None where there is none."""
    path = (folder / name).resolve()
    return read_text(path) if path.is_file() else None


class Weights:
    """The tensors of such a folder, by their names: in one file, or in several with an index. Reads when asked.

    `whole` is the name of the one file. Raises `ExchangeError` for files that are missing, damaged, or no safetensors.
    """

    def __init__(self, folder: Path, whole: str = WEIGHTS):
        self._open: dict[Path, Any] = {}
        self.tensors: dict[str, Stored] = {}
        paths = _files(folder, whole)
        for path in paths:
            for name, stored in self._contents(path).items():
                if name in self.tensors:
                    raise ExchangeError(folder, [f"{name} is in {self.tensors[name].path.name} and in {path.name}"])
                self.tensors[name] = stored
        index = read_object(folder, INDEX) if paths != [folder / whole] else None
        for name, file in index["weight_map"].items() if index else ():
            if name not in self.tensors or self.tensors[name].path.name != file:
                raise ExchangeError(folder, [f"{INDEX} says that {name} is in {file}, and it is not"])

    def __enter__(self) -> "Weights":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

    def read(self, name: str) -> np.ndarray:
        """A tensor, in memory of its own."""
        path = self.tensors[name].path
        return _try(path, lambda: self._open[path].get_tensor(name))

    def _contents(self, path: Path) -> dict[str, Stored]:
        from safetensors import safe_open

        _check_header(path)
        file = self._open[path] = _try(path, lambda: safe_open(path.resolve(), framework="np"))
        found = {}
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            part = file.get_slice(name)
            if part.get_dtype() not in DTYPES:
                wanted = ", ".join(DTYPES)
                raise ExchangeError(path, [f"{name} is of dtype {part.get_dtype()}; gptjax reads {wanted}"])
            found[name] = Stored(path, jnp.dtype(DTYPES[part.get_dtype()]), tuple(part.get_shape()))
        return found


def _files(folder: Path, whole: str) -> list[Path]:
    """The safetensors files of a folder, each known to be there: the one, or those of the index of a model."""
    if (folder / whole).is_file():
        return [folder / whole]
    index = read_object(folder, INDEX) if whole == WEIGHTS else None
    if index is None:
        raise ExchangeError(folder, [_no_weights(folder, whole)])
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ExchangeError(folder / INDEX, ["is damaged: weight_map, with the file of each tensor, was expected"])
    files = sorted(set(names.values()))
    if strange := [f for f in files if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", f)]:
        problem = f"{strange[0]!r} is not the name of a safetensors file in this folder; gptjax does not open it"
        raise ExchangeError(folder / INDEX, [problem])
    if missing := [f for f in files if not (folder / f).is_file()]:
        raise ExchangeError(
            folder, [f"{f} is missing, which {INDEX} names; bring it, or fetch the model again" for f in missing]
        )
    return [folder / f for f in files]


def _no_weights(folder: Path, whole: str) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (
            f"holds its weights as {pickles[0]} and not as {whole}. gptjax does not unpickle, as that can run any "
            "code; save the model with save_pretrained(..., safe_serialization=True) in transformers"
        )
    missing = f"neither {WEIGHTS} nor {INDEX}" if whole == WEIGHTS else f"no {whole}"
    return f"holds {missing}; gptjax reads weights from safetensors only"


def _check_header(path: Path) -> None:
    """Raises `ExchangeError` before any memory is taken by the header of a file that cannot be what it says."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        size = int.from_bytes(file.read(8), "little") if stat.S_ISREG(status.st_mode) else -1
    if status.st_size < 8 or not 0 <= size <= status.st_size - 8:
        raise ExchangeError(path, ["is no safetensors file, or was cut off: its header is longer than the file"])
    if size > LARGEST_HEADER:
        raise ExchangeError(path, [f"has a header of {size:,} bytes, more than the {LARGEST_HEADER:,} of any model"])


def _try(path: Path, action: Any) -> Any:
    """What an action on a safetensors file gives; the library raises kinds of errors of its own."""
    try:
        return action()
    except Exception as e:
        raise ExchangeError(path, [f"is damaged, or cut off ({e}); fetch it again"]) from None


def check_empty(folder: Path) -> None:
    """Raises `ExchangeError` where a folder is none, or holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExchangeError(folder, ["is there already and not empty; nothing is written over: name another folder"])


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Makes a folder, or takes an empty one, for what is written meanwhile; where that fails, it is emptied again.

    Raises `ExchangeError` where the folder holds something or cannot be written.
    """
    check_empty(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as e:
        for path in folder.iterdir() if folder.is_dir() else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not isinstance(e, OSError):
            raise
        raise ExchangeError(folder, [f"cannot be written ({e.strerror or e}); name another folder"]) from None


def write_weights(
    folder: Path, sizes: dict[str, int], tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
    """Writes tensors into one file, or into several of at most `max_shard_bytes` with an index.

    `sizes` has the bytes of each, in the order in which they come; no more than one file of them is held in memory.
    """
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    stream = iter(tensors)
    count = len(shards)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        write_file(folder / file, dict(_take(stream, names)))
        where |= dict.fromkeys(names, file)
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    sync_folder(folder)


def _take(stream: Iterator[tuple[str, np.ndarray]], names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    for expected in names:
        name, array = next(stream)
        assert name == expected
        yield name, array


def write_file(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file, and returns when it is on disk."""
    from safetensors.numpy import save_file

    assert all(x.flags.c_contiguous for x in tensors.values())  # it would write any other in a wrong order
    path.touch()
    mode = path.stat().st_mode  # the library would hide the file from everybody else
    try:
        save_file(tensors, path, metadata={"format": "pt"})  # transformers insists on this word
    except Exception as e:  # of the library's own kind, also for a full disk
        raise OSError(f"{path.name}: {e}") from None
    path.chmod(mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())
