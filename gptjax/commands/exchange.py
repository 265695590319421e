"""`gptjax import` and `gptjax export`: convert Hugging Face models to run folders, and back."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from gptjax.commands import check_unused, parse, start_jax
from gptjax.errors import ExchangeError

if TYPE_CHECKING:
    from gptjax.config import ModelConfig

WITH_ADAPTER = "no effect with --adapter: an adapter is one float32 file, of the family of its base model"
WITHOUT_ADAPTER = "no effect without --adapter"
UNUSED = {True: {WITH_ADAPTER: ["family", "dtype", "max_shard_size"]}, False: {WITHOUT_ADAPTER: ["base"]}}


@dataclass(frozen=True)
class Import:
    """Convert a Hugging Face model (gpt2, llama, gpt_neox, bert) to a run folder, and check its logits."""

    source: Annotated[
        Positional[str], tyro.conf.arg(metavar="MODEL")
    ]  # a Hugging Face folder, the folder of an adapter, or a name on the hub
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]  # the run folder to create; must be new or empty
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; the weights are stored in float32
    tokenizer: str | None = None  # byte, a folder with tokenizer files, a run folder or a hub name; None: that of MODEL


@dataclass(frozen=True)
class Export:
    """Convert a run to a Hugging Face model that transformers can load, and check its logits."""

    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]  # a run folder
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="FOLDER")]  # the folder to create; must be new or empty
    family: str = "auto"  # gpt2, llama or gpt_neox; auto: the first one that can express the model exactly
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    max_shard_size: str = "5GB"  # of a file of weights, in MB or GB
    checkpoint: str = "last"  # last, best, or a step
    adapter: bool = False  # export only the LoRA weights, as a PEFT adapter; otherwise they are merged
    base: str | None = None  # the base model of the adapter; None: the Hugging Face model in init


def import_(arguments: list[str]) -> None:
    """A Hugging Face model -> a run folder, which is then loaded and compared with it."""
    options: Import = parse(Import, arguments, "import")
    start_jax()
    from gptjax.interop.files import check_empty
    from gptjax.interop.logit_check import compare_logits, require_agreement
    from gptjax.interop.open import load, locate, open_tokenizer
    from gptjax.interop.runs import import_run
    from gptjax.training.restore import open_trained

    check_empty(options.run)
    folder, adapter = locate(options.source)
    tokenizer = None if options.tokenizer is None else open_tokenizer(options.tokenizer)
    pretrained = load(folder, adapter, options.source, tokenizer)
    run = import_run(pretrained, options.run, options.source, options.dtype)
    line = require_agreement(compare_logits(open_trained(run), folder, adapter), str(options.run))
    print(f"{options.run}: {options.source}, {_size(run.experiment.model)}\n{line}")


def export(arguments: list[str]) -> None:
    """A run folder -> a Hugging Face model, which is then loaded and compared with it."""
    options: Export = parse(Export, arguments, "export")
    check_unused(options, UNUSED[options.adapter])
    max_shard_bytes = _bytes(options.max_shard_size)
    start_jax()
    if options.adapter:
        return _export_adapter(options)
    from gptjax.interop.files import check_empty
    from gptjax.interop.huggingface import read_config
    from gptjax.interop.logit_check import compare_logits, require_agreement, rounded
    from gptjax.interop.saving import save_folder
    from gptjax.training.restore import open_trained
    from gptjax.training.run import open_run

    check_empty(options.folder)
    pretrained = open_trained(open_run(options.run), options.checkpoint)
    save_folder(pretrained, options.folder, options.family, options.dtype, max_shard_bytes)
    family = read_config(options.folder)[0]
    line = require_agreement(compare_logits(rounded(pretrained, options.dtype), options.folder), str(options.folder))
    print(f"{options.folder}: {options.run} as {family.architecture} in {options.dtype}\n{line}")


def _export_adapter(options: Export) -> None:
    """The LoRA weights of a run -> a PEFT adapter, which is then loaded on its base model and compared with the run."""
    from gptjax.interop.adapter import base_of_run, save_adapter
    from gptjax.interop.files import check_empty
    from gptjax.interop.logit_check import compare_logits, require_agreement
    from gptjax.interop.open import fetch
    from gptjax.training.restore import open_trained
    from gptjax.training.run import open_run

    check_empty(options.folder)
    run = open_run(options.run)
    base = base_of_run(run, options.base)
    folder = fetch(base)
    pretrained = open_trained(run, options.checkpoint, merge=False)
    save_adapter(pretrained, options.folder, base, folder)
    line = require_agreement(compare_logits(pretrained, folder, options.folder), str(options.folder))
    print(f"{options.folder}: the LoRA weights of {options.run}, an adapter for {base}\n{line}")


def _size(config: "ModelConfig") -> str:
    from gptjax.model.size import num_params

    return f"{num_params(config)['total']:,} parameters, context length {config.context_length:,}"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[match[2].upper()] if match else 0
    if size < 1:
        raise ExchangeError("max_shard_size", [f"{text!r} is not a size; for instance 5GB or 500MB"])
    return int(size)
