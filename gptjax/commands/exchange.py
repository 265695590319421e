"""`gptjax import` and `gptjax export`: models of Hugging Face to run folders, and back."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from gptjax.commands import check_unused, parse, start_jax
from gptjax.errors import ExchangeError

WITH = "an adapter is one float32 file, of the family of its model"
WITHOUT = "only an adapter has a base; add --adapter"


@dataclass(frozen=True)
class Import:
    """Make a run folder of a Hugging Face model (gpt2, llama, gpt_neox, bert), and check its logits."""

    source: Positional[str]  # a folder with config.json and model.safetensors, or of an adapter, or a name on the hub
    run: Positional[Path]  # the run folder to make: new, or empty
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; the weights are kept in float32


@dataclass(frozen=True)
class Export:
    """Write a run as a Hugging Face model that transformers loads, and check its logits."""

    run: Positional[Path]  # a run folder
    folder: Positional[Path]  # the folder to write: new, or empty
    family: str = "auto"  # gpt2, llama or gpt_neox; auto: the first that can express the model exactly
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    max_shard_size: str = "5GB"  # of one file of weights; MB and GB are understood
    checkpoint: str = "last"  # last, best, or a step
    adapter: bool = False  # of a run with LoRA only what it learnt, as PEFT loads it; else that is added to the weights
    base: str | None = None  # the Hugging Face model that the adapter is for; None: the one that the run began with


def import_(arguments: list[str]) -> None:
    """A Hugging Face model -> a run folder, which is then read again and compared with it."""
    options: Import = parse(Import, arguments, "import")
    start_jax()
    from gptjax.interop.files import check_empty
    from gptjax.interop.logit_check import compare_logits, require_agreement
    from gptjax.interop.open import find, load
    from gptjax.interop.runs import import_run
    from gptjax.training.train_setup import open_trained

    check_empty(options.run)
    folder, adapter = find(options.source)
    run = import_run(load(folder, adapter, options.source), options.run, options.source, options.dtype)
    line = require_agreement(compare_logits(open_trained(run), folder, adapter), str(options.run))
    print(f"{options.run}: {options.source}, {_size(run.experiment.model)}\n{line}")


def export(arguments: list[str]) -> None:
    """A run folder -> a Hugging Face model, which is then read and compared with it."""
    options: Export = parse(Export, arguments, "export")
    check_unused(options, {WITH: ["family", "dtype", "max_shard_size"]} if options.adapter else {WITHOUT: ["base"]})
    size = _bytes(options.max_shard_size)
    start_jax()
    if options.adapter:
        return _export_adapter(options)
    from gptjax.interop.files import check_empty
    from gptjax.interop.huggingface import read_config
    from gptjax.interop.logit_check import compare_logits, require_agreement, rounded
    from gptjax.interop.saving import save_folder
    from gptjax.training.run import open_run
    from gptjax.training.train_setup import open_trained

    check_empty(options.folder)
    pretrained = open_trained(open_run(options.run), options.checkpoint)
    save_folder(pretrained, options.folder, options.family, options.dtype, size)
    family = read_config(options.folder)[0]
    line = require_agreement(compare_logits(rounded(pretrained, options.dtype), options.folder), str(options.folder))
    print(f"{options.folder}: {options.run} as {family.architecture} in {options.dtype}\n{line}")


def _export_adapter(options: Export) -> None:
    """What a run with LoRA learnt -> an adapter of PEFT, which is then put on its model and compared with the run."""
    from gptjax.interop.adapter import base_of_run, save_adapter
    from gptjax.interop.files import check_empty
    from gptjax.interop.logit_check import compare_logits, require_agreement
    from gptjax.interop.open import fetch
    from gptjax.training.run import open_run
    from gptjax.training.train_setup import open_trained

    check_empty(options.folder)
    run = open_run(options.run)
    base = base_of_run(run, options.base)
    folder = fetch(base)
    pretrained = open_trained(run, options.checkpoint, merge=False)
    save_adapter(pretrained, options.folder, base, folder)
    line = require_agreement(compare_logits(pretrained, folder, options.folder), str(options.folder))
    print(f"{options.folder}: what {options.run} learnt, an adapter for {base}\n{line}")


def _size(model: object) -> str:
    from gptjax.config import ModelConfig
    from gptjax.training.metrics import num_params

    assert isinstance(model, ModelConfig)
    return f"{num_params(model)['total']:,} parameters, context {model.context_length:,}"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[match[2].upper()] if match else 0
    if size < 1:
        raise ExchangeError("max_shard_size", [f"{text!r} is no size; 5GB and 500MB are"])
    return int(size)
