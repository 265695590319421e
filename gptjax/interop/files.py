"""Untrusted folders in Hugging Face's layout: links, pickles, oversized and damaged files are refused.

Weights are only read from safetensors files: a JSON header and the bytes of the arrays. gptjax never unpickles.
"""

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax.numpy as jnp  # also adds bfloat16 to NumPy (ml_dtypes)
import numpy as np

from gptjax.atomic_io import read_json, read_text, sync_folder
from gptjax.errors import ExchangeError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION, TOKENIZER, TEMPLATE = "generation_config.json", "tokenizer_config.json", "chat_template.jinja"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
MAX_HEADER = 100_000_000  # bytes: the header of a model with a million tensors
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class TensorInfo(NamedTuple):
    """A tensor in a file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]


def check_folder(folder: Path) -> None:
    """Raises `ExchangeError` if a folder is missing or has links to files outside.

    Links from `models--NAME/snapshots/REVISION` to `models--NAME/blobs`, as in the hub's cache, are followed.
    """
    if not folder.is_dir():
        raise ExchangeError(folder, ["is not a folder; name one with config.json and model.safetensors"])
    resolved = folder.resolve()
    allowed = [resolved]
    if resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--"):
        allowed.append(resolved.parent.parent / "blobs")
    problems = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in allowed):
            problems.append(f"{path.name} is a link to a file outside of the folder; gptjax does not follow it")
        elif path.exists() and not (path.is_file() or path.is_dir()):
            problems.append(f"{path.name} is neither a file nor a folder")
    if problems:
        raise ExchangeError(folder, problems)


def read_object(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in a file of a folder checked by `check_folder`; None if there is no such file."""
    path = (folder / name).resolve()
    return read_json(path) if path.is_file() else None


def read_text_file(folder: Path, name: str) -> str | None:
    """The text of a file of such a folder; None if there is no such file."""
    path = (folder / name).resolve()
    return read_text(path) if path.is_file() else None


class SafetensorsReader:
    """The tensors of such a folder by name, in one file or in several with an index. Tensors are read on demand.

    `single` is the name of the one file. Raises `ExchangeError` for files that are missing, damaged or not safetensors.
    """

    def __init__(self, folder: Path, single: str = WEIGHTS):
        self._open: dict[Path, Any] = {}
        self._folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._unreadable: dict[str, str] = {}  # name -> dtype of tensors that are no weights of a model
        where: dict[str, str] = {}
        paths = _files(folder, single)
        for path in paths:
            for name in self._contents(path):
                if name in where:
                    raise ExchangeError(folder, [f"{name} is in {where[name]} and in {path.name}"])
                where[name] = path.name
        index = read_object(folder, INDEX) if paths != [folder / single] else None
        for name, file in index["weight_map"].items() if index else ():
            if where.get(name) != file:
                raise ExchangeError(folder, [f"{INDEX} says that {name} is in {file}, but it is not"])

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

    def read_tensor(self, name: str) -> np.ndarray:
        """A copy of a tensor. Raises `ExchangeError` if it is damaged, or holds NaN or Inf."""
        path = self.tensors[name].path
        tensor = _open_safely(path, lambda: self._open[path].get_tensor(name))
        if not np.isfinite(tensor).all():
            raise ExchangeError(path, [f"{name} holds NaN or Inf, so the model cannot be used; get its weights again"])
        return tensor

    def check_dtypes(self, is_buffer: Callable[[str], bool] = lambda _: False) -> None:
        """Raises `ExchangeError` for tensors of dtypes that weights do not have, unless they are buffers."""
        supported = ", ".join(DTYPES)
        problems = [
            f"{name} has dtype {dtype}; gptjax reads {supported}"
            for name, dtype in self._unreadable.items()
            if not is_buffer(name)
        ]
        if problems:
            raise ExchangeError(self._folder, problems[:8] + [f"and {len(problems) - 8} others"] * (len(problems) > 8))

    def _contents(self, path: Path) -> list[str]:
        """The names of the tensors in a file, whose shapes and dtypes are kept."""
        from safetensors import safe_open

        _check_header(path)
        file = self._open[path] = _open_safely(path, lambda: safe_open(path.resolve(), framework="np"))
        names = list(file.keys())
        for name in names:
            part = file.get_slice(name)
            dtype = part.get_dtype()
            if dtype in DTYPES:
                self.tensors[name] = TensorInfo(path, jnp.dtype(DTYPES[dtype]), tuple(part.get_shape()))
            else:
                self._unreadable[name] = dtype
        return names


def _files(folder: Path, single: str) -> list[Path]:
    """The safetensors files of a folder, checked to exist: the single one, or those of the index."""
    if (folder / single).is_file():
        return [folder / single]
    index = read_object(folder, INDEX) if single == WEIGHTS else None
    if index is None:
        raise ExchangeError(folder, [_no_weights(folder, single)])
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise ExchangeError(folder / INDEX, ["is damaged: weight_map, with the file of each tensor, was expected"])
    files = sorted(set(names.values()))
    if invalid := [f for f in files if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", f)]:
        problem = f"{invalid[0]!r} is not the name of a safetensors file in this folder; gptjax does not open it"
        raise ExchangeError(folder / INDEX, [problem])
    if missing := [f for f in files if not (folder / f).is_file()]:
        raise ExchangeError(
            folder, [f"{f} is in {INDEX} but missing; add it, or download the model again" for f in missing]
        )
    return [folder / f for f in files]


def _no_weights(folder: Path, single: str) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (
            f"has its weights in {pickles[0]} and not in {single}. gptjax does not unpickle, because that can run "
            "any code; save the model with save_pretrained(..., safe_serialization=True) in transformers"
        )
    missing = f"neither {WEIGHTS} nor {INDEX}" if single == WEIGHTS else f"no {single}"
    return f"has {missing}; gptjax only reads weights from safetensors files"


def _check_header(path: Path) -> None:
    """Raises `ExchangeError` for a header with an impossible size, before memory is allocated for it."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        size = int.from_bytes(file.read(8), "little") if stat.S_ISREG(status.st_mode) else -1
    if status.st_size < 8 or not 0 <= size <= status.st_size - 8:
        raise ExchangeError(path, ["is not a safetensors file, or is cut off: its header is longer than the file"])
    if size > MAX_HEADER:
        raise ExchangeError(path, [f"has a header of {size:,} bytes; at most {MAX_HEADER:,} are allowed"])


def _open_safely(path: Path, action: Any) -> Any:
    """The result of an action on a safetensors file; turns any error of the library into an `ExchangeError`."""
    try:
        return action()
    except Exception as e:
        raise ExchangeError(path, [f"is damaged or cut off ({e}); download it again"]) from None


def check_empty(folder: Path) -> None:
    """Raises `ExchangeError` if a path is not a folder, or a folder that is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExchangeError(
            folder, ["already exists and is not empty; gptjax does not overwrite it: name another folder"]
        )


@contextlib.contextmanager
def fill_folder(folder: Path) -> Iterator[None]:
    """Creates a folder, or takes an empty one, for files to be written; empties it again after an error.

    Raises `ExchangeError` if the folder is not empty or not writable.
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

    `sizes`: the bytes of each tensor, in the order of `tensors`. At most one file is held in memory.
    """
    shards: list[list[str]] = [[]]
    space = max_shard_bytes
    for name, size in sizes.items():
        if size > space and shards[-1]:
            shards.append([])
            space = max_shard_bytes
        shards[-1].append(name)
        space -= size
    stream = iter(tensors)
    count = len(shards)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        write_file(folder / file, dict(_take(stream, names)))
        weight_map |= dict.fromkeys(names, file)
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    sync_folder(folder)


def _take(stream: Iterator[tuple[str, np.ndarray]], names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    for expected in names:
        name, array = next(stream)
        assert name == expected
        yield name, array


def write_file(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file and syncs it to disk."""
    from safetensors.numpy import save_file

    assert all(x.flags.c_contiguous for x in tensors.values())  # the library writes other layouts in the wrong order
    path.touch()
    mode = path.stat().st_mode  # the library would make the file readable by its owner only
    try:
        save_file(tensors, path, metadata={"format": "pt"})  # transformers requires this value
    except Exception as e:  # the library's own error type, also for a full disk
        raise OSError(f"{path.name}: {e}") from None
    path.chmod(mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())
