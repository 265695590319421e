"""Opens any model: a run folder, a Hugging Face folder, a PEFT adapter, or a name on the hub."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from gptjax.data.tokenizer import DESCRIPTION, ByteTokenizer, Tokenizer
from gptjax.data.tokenizer import load as load_tokenizer
from gptjax.data.tokenizer.huggingface_read import from_huggingface
from gptjax.errors import ExchangeError, RunError
from gptjax.inference.pretrained import Pretrained
from gptjax.interop import adapter
from gptjax.interop.files import CONFIG
from gptjax.interop.huggingface import load_folder, read_config
from gptjax.training.restore import open_trained
from gptjax.training.run import EXPERIMENT, open_run

DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "vocab.*"]  # no pickles, no code
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def open_model(name: str, checkpoint: str = "last") -> Pretrained:
    """Opens a model by its folder or hub name; `checkpoint` (last, best or a step) is for run folders.

    Raises a `GptjaxError` if there is no such model.
    """
    path = Path(name)
    if (path / EXPERIMENT).is_file():
        return open_trained(open_run(path), checkpoint)
    if path.is_dir() and not any((path / file).is_file() for file in (CONFIG, adapter.CONFIG)):
        raise ExchangeError(
            path,
            [f"holds neither {EXPERIMENT} (a run folder) nor {CONFIG} (a Hugging Face model), nor {adapter.CONFIG} (a "
             "PEFT adapter)"],
        )  # fmt: skip
    return load(*locate(name), name)


def load(folder: Path, adapter_folder: Path | None, name: str, tokenizer: Tokenizer | None = None) -> Pretrained:
    """Loads the model in a Hugging Face folder, with an adapter merged in. `tokenizer` None: that in the folder."""
    pretrained = load_folder(folder, name, tokenizer)
    if adapter_folder is None:
        return pretrained
    family, config = read_config(folder)
    params = adapter.add_adapter(adapter_folder, family, config, pretrained.params)
    return dataclasses.replace(pretrained, params=params)


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer `byte`, or that of a run folder, of a folder with Hugging Face files, or of a model on the hub."""
    if name == "byte":
        return ByteTokenizer()
    folder = fetch(name)
    if (folder / EXPERIMENT).is_file():
        return open_run(folder).tokenizer()
    if (folder / DESCRIPTION).is_file():
        return load_tokenizer(folder)
    return from_huggingface(folder)


def locate(name: str) -> tuple[Path, Path | None]:
    """The folder of a model, and that of an adapter if `name` is one; the adapter then names its base model.

    Raises `ExchangeError` if one of the two is not available.
    """
    folder = fetch(name)
    base = adapter.base_of(folder)
    if base is None:
        return folder, None
    try:
        return fetch(base), folder
    except ExchangeError as e:
        raise ExchangeError(folder / adapter.CONFIG, [f"has the base model {base!r}: {e}"]) from None


def open_local(name: str) -> Pretrained:
    """`open_model` for a name from an untrusted run folder: downloads nothing.

    Raises `RunError` if there is no such folder.
    """
    if not Path(name).is_dir():
        raise RunError(
            f"{name}: is not a folder here, and gptjax downloads nothing that a run folder names; download it first"
        )
    return open_model(name)


def fetch(name: str) -> Path:
    """A local folder; else the files of a model from the Hugging Face hub or its cache.

    Raises `ExchangeError` if it is not available.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise ExchangeError(path, ["is a file; name its folder"])
    if not HUB_NAME.fullmatch(name):
        raise ExchangeError(path, ["does not exist"])
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED, ignore_patterns=["*/*"]))
    except ImportError:
        problem = "huggingface_hub, which downloads models, is not installed (pip install huggingface_hub)"
    except Exception as e:  # errors of the hub, of HTTP or of the disk
        problem = _why(e)
    raise ExchangeError(
        name, [f"is not a folder here (a run must be trained first), and cannot be downloaded from the hub: {problem}"]
    )


def _why(e: Exception) -> str:
    kinds: dict[str, Any] = {
        "GatedRepoError": "access to this model must be requested from its authors; run hf auth login",
        "RepositoryNotFoundError": "it has no model with this name (or it is private: run hf auth login)",
        "LocalEntryNotFoundError": "the hub cannot be reached, and the cache has no copy",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and the cache has no copy",
    }
    lines = str(e).strip().splitlines() or [""]
    return kinds.get(type(e).__name__, f"{type(e).__name__}: {lines[0][:200]}")
