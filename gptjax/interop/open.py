"""One way to open any model: a run folder, a folder of Hugging Face, or a name on its hub."""

import re
from pathlib import Path
from typing import Any

from gptjax.errors import ExchangeError, PromptError, RunError
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.rules import Sampling
from gptjax.interop.files import CONFIG
from gptjax.interop.huggingface import load_folder
from gptjax.training.run import EXPERIMENT, GENERATION, Run, open_run
from gptjax.training.workshop import load_params

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "vocab.*"]  # never a pickle, never code
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def open_model(name: str, checkpoint: str = "last") -> Pretrained:
    """The model that a user means; `checkpoint` (last, best or a step) is that of a run folder.

    Raises `GptjaxError`s that say what was looked for.
    """
    path = Path(name)
    if (path / EXPERIMENT).is_file():
        return open_trained(open_run(path), checkpoint)
    if path.is_dir() and not (path / CONFIG).is_file():
        raise ExchangeError(
            path,
            [f"holds neither {EXPERIMENT} (a run folder of gptjax has one) nor {CONFIG} (a model of Hugging Face has)"],
        )
    return load_folder(fetch(name), name)


def open_trained(run: Run, checkpoint: str = "last") -> Pretrained:
    """The model in a run folder."""
    params, _ = load_params(run, checkpoint)
    given = run.generation()
    try:
        Sampling(**given.get("recommended", {}))
        return Pretrained(
            name=run.experiment.name,
            model=run.experiment.model,
            params=params,
            tokenizer=run.tokenizer(),
            recommended=given.get("recommended", {}),
            stop_tokens=tuple(map(int, given.get("stop_tokens", ()))),
            chat_template=given.get("chat_template"),
        )
    except (TypeError, ValueError, PromptError) as e:
        raise RunError(f"{run.folder / GENERATION}: is damaged ({e})") from None


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
    raise ExchangeError(name, [f"is no folder here, and could not be fetched from the Hugging Face hub: {problem}"])


def _why(e: Exception) -> str:
    kinds: dict[str, Any] = {
        "GatedRepoError": "its makers give it to those only who have asked for it; run hf auth login",
        "RepositoryNotFoundError": "it has no model of this name (or it is private: run hf auth login)",
        "LocalEntryNotFoundError": "it cannot be reached, and the cache has no copy",
        "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and the cache has no copy",
    }
    lines = str(e).strip().splitlines() or [""]
    return kinds.get(type(e).__name__, f"{type(e).__name__}: {lines[0][:200]}")
