"""One way to open any model: a run folder, a folder of Hugging Face or of a PEFT adapter, or a name on the hub."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from gptjax.errors import ExchangeError, RunError
from gptjax.inference.pretrained import Pretrained
from gptjax.interop import adapter
from gptjax.interop.files import CONFIG
from gptjax.interop.huggingface import load_folder, read_config
from gptjax.training.run import EXPERIMENT, open_run
from gptjax.training.train_setup import open_trained

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "vocab.*"]  # never a pickle, never code
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def open_model(name: str, checkpoint: str = "last") -> Pretrained:
    """The model that a user means; `checkpoint` (last, best or a step) is that of a run folder.

    Raises `GptjaxError`s that say what was looked for.
    """
    path = Path(name)
    if (path / EXPERIMENT).is_file():
        return open_trained(open_run(path), checkpoint)
    if path.is_dir() and not any((path / file).is_file() for file in (CONFIG, adapter.CONFIG)):
        raise ExchangeError(
            path,
            [f"holds neither {EXPERIMENT} (a run folder of gptjax has one) nor {CONFIG} (a model of Hugging Face has), "
             f"nor {adapter.CONFIG} (an adapter of PEFT has)"],
        )  # fmt: skip
    return load(*find(name), name)


def load(folder: Path, added: Path | None, name: str) -> Pretrained:
    """The model in a folder of Hugging Face; with the adapter in another one, what it learnt added to the weights."""
    model = load_folder(folder, name)
    if added is None:
        return model
    params = adapter.add_adapter(added, read_config(folder)[0], model.model, model.params)
    return dataclasses.replace(model, params=params)


def find(name: str) -> tuple[Path, Path | None]:
    """The folder of a model, and that of an adapter where `name` is one: then its model is found as it is named there.

    Raises `ExchangeError` where one of the two cannot be had.
    """
    folder = fetch(name)
    base = adapter.base_of(folder)
    if base is None:
        return folder, None
    try:
        return fetch(base), folder
    except ExchangeError as e:
        raise ExchangeError(folder / adapter.CONFIG, [f"belongs to the model {base!r}: {e}"]) from None


def open_local(name: str) -> Pretrained:
    """`open_model` for a name that a run folder gives, which may be a stranger's: nothing is fetched for it.

    Raises `RunError` where there is no such folder.
    """
    if not Path(name).is_dir():
        raise RunError(
            f"{name}: is no folder here, and a run folder's own words fetch nothing from the hub; get it first"
        )
    return open_model(name)


def fetch(name: str) -> Path:
    """A folder as it is; else the files of a model on the Hugging Face hub, or in its cache.

    Raises `ExchangeError` where it cannot be had.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise ExchangeError(path, ["is a file; name the folder that it lies in"])
    if not HUB_NAME.fullmatch(name):
        raise ExchangeError(path, ["does not exist"])
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        return Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=["*/*"]))
    except ImportError:
        problem = "huggingface_hub, which fetches models from the hub, is not installed (pip install huggingface_hub)"
    except Exception as e:  # of the hub, of HTTP, of the disk
        problem = _why(e)
    raise ExchangeError(
        name, [f"is no folder here (train it first, if it is a run), and could not be fetched from the hub: {problem}"]
    )


def _why(e: Exception) -> str:
    kinds: dict[str, Any] = {
        "GatedRepoError": "its makers give it to those only who have asked for it; run hf auth login",
        "RepositoryNotFoundError": "it has no model of this name (or it is private: run hf auth login)",
        "LocalEntryNotFoundError": "it cannot be reached, and the cache has no copy",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and the cache has no copy",
    }
    lines = str(e).strip().splitlines() or [""]
    return kinds.get(type(e).__name__, f"{type(e).__name__}: {lines[0][:200]}")
