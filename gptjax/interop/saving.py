"""Exports models in the format of Hugging Face's transformers, in a family that can express them exactly."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.atomic_io import write_atomic
from gptjax.config import ModelConfig
from gptjax.data.tokenizer.huggingface_write import to_huggingface
from gptjax.errors import ExchangeError
from gptjax.inference.pretrained import Pretrained, check_is_generative
from gptjax.interop import files
from gptjax.interop.families import FAMILIES, inexpressible, normalized
from gptjax.interop.family import Family
from gptjax.interop.files import CONFIG, GENERATION, TEMPLATE
from gptjax.interop.huggingface import SAMPLING_FIELDS
from gptjax.interop.layout import Tensor, weight_shapes
from gptjax.training.state import leaf_name


def choose_family(config: ModelConfig, name: str = "auto") -> Family:
    """The requested family; with `auto` the first that can express a model exactly.

    Raises `ExchangeError` with the fields that each family cannot express.
    """
    writable = {n: f for n, f in FAMILIES.items() if f.to_hf_config is not None}
    if name != "auto" and name not in writable:
        raise ExchangeError("family", [f"{name!r} is unknown; choose one of auto, {', '.join(writable)}"])
    problems = []
    for family in writable.values() if name == "auto" else [writable[name]]:
        different = inexpressible(family, config)
        if not different:
            return family
        fields = [f"model.{field} = {ours!r} ({theirs!r} there)" for field, (ours, theirs) in different.items()]
        problems.append(f"{family.name} does not support {', '.join(fields)}")
    raise ExchangeError("this model cannot be exported to transformers exactly", problems)


def save_folder(
    pretrained: Pretrained,
    folder: Path,
    family: str = "auto",
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Exports a model into a new or empty folder, in a family that can express it exactly; config.json is written last.

    Raises `ExchangeError` if no family can express it, or the folder is not empty.
    """
    check_is_generative(pretrained)
    chosen = choose_family(pretrained.model, family)
    with files.fill_folder(folder):
        to_huggingface(pretrained.tokenizer, folder)
        files.write_weights(folder, *_tensors_to_write(chosen, pretrained, dtype), max_shard_bytes)
        if pretrained.chat_template is not None:
            write_atomic(folder / TEMPLATE, pretrained.chat_template)
        ids = _special_ids(pretrained)
        _write_json(folder / GENERATION, pretrained.extra_generation_config | _sampling_fields(pretrained) | ids)
        _write_json(folder / CONFIG, _settings(chosen, pretrained.model) | {"torch_dtype": dtype} | ids)


def _settings(family: Family, config: ModelConfig) -> dict[str, Any]:
    assert family.to_hf_config is not None
    values = family.to_hf_config(
        dataclasses.replace(normalized(config), dropout=config.dropout, init_std=config.init_std)
    )
    return {"architectures": [family.architecture], "model_type": family.name} | values


def _tensors_to_write(
    family: Family, pretrained: Pretrained, dtype: str
) -> tuple[dict[str, int], Iterator[tuple[str, np.ndarray]]]:
    """The size in bytes of every tensor by name, and the tensors in the same order."""
    config = pretrained.model
    if config.norm == "layernorm":
        config = dataclasses.replace(config, bias=True)  # these families always have biases
    tensors = family.tensors(config)
    shapes = weight_shapes(config)
    kind = jnp.dtype(dtype)
    params = {leaf_name(path): x for path, x in jax.tree.leaves_with_path(pretrained.params)}
    order = [(t, i) for t in tensors for i in range(config.num_layers if t.layered else 1)]
    order.sort(key=lambda pair: (pair[0].layered, pair[1]))  # layer by layer, so that a layer is in one file

    def weight(name: str, layer: int | None) -> np.ndarray:
        if name not in params:
            return np.zeros(shapes[name], kind)
        value = np.asarray(params[name])
        return (value if layer is None else value[layer]).astype(kind, copy=False)

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for t, i in order:
            yield name_of(t, i), t.join([weight(w, i if t.layered else None) for w in t.weights])

    def name_of(t: Tensor, i: int) -> str:
        return family.full_name(t.name.format(i=i))

    sizes = {name_of(t, i): int(np.prod(t.shape(shapes[t.weights[0]]))) * kind.itemsize for t, i in order}
    return sizes, stream()


def _special_ids(pretrained: Pretrained) -> dict[str, Any]:
    t = pretrained.tokenizer
    ends = list(dict.fromkeys(i for i in (t.eos_id, *pretrained.stop_tokens) if i is not None))
    return {"bos_token_id": t.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def _sampling_fields(pretrained: Pretrained) -> dict[str, Any]:
    """The sampling parameters as fields of generation_config.json, without those that transformers does not have."""
    fields = {name: value for name, value in pretrained.generation_config.items() if name in SAMPLING_FIELDS}
    if fields.get("temperature") == 0:
        return {name: value for name, value in fields.items() if name != "temperature"} | {"do_sample": False}
    if fields.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        return fields | {"do_sample": True}
    return fields


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(values, indent=2) + "\n")
