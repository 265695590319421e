"""Models written as Hugging Face's transformers reads them, in the family that can express them exactly."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.atomic_io import write_atomic
from gptjax.data.tokenizer.huggingface_write import to_huggingface
from gptjax.errors import ExchangeError
from gptjax.inference.pretrained import Pretrained, check_is_generative
from gptjax.interop import files
from gptjax.interop.families import FAMILIES, inexpressible, plain
from gptjax.interop.family import Family
from gptjax.interop.files import CONFIG, GENERATION, TEMPLATE
from gptjax.interop.huggingface import RECOMMENDED
from gptjax.interop.layout import Tensor, weight_shapes
from gptjax.training.state import leaf_name


def choose_family(config: ModelConfig, name: str = "auto") -> Family:
    """The family that is asked for, else the first that can express a model exactly.

    Raises `ExchangeError` with the fields of the model that each of them does not have.
    """
    writable = {n: f for n, f in FAMILIES.items() if f.write is not None}
    if name != "auto" and name not in writable:
        raise ExchangeError("family", [f"{name!r} is none; there are auto, {', '.join(writable)}"])
    problems = []
    for tried in writable.values() if name == "auto" else [writable[name]]:
        different = inexpressible(tried, model)
        if not different:
            return tried
        told = [f"model.{field} = {ours!r} ({theirs!r} there)" for field, (ours, theirs) in different.items()]
        problems.append(f"{tried.name} has no {', '.join(told)}")
    raise ExchangeError("this model cannot be expressed exactly in transformers", problems)


def save_folder(
    pretrained: Pretrained,
    folder: Path,
    family: str = "auto",
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a model into a new or empty folder, in the family that can express it exactly; config.json comes last.

    Raises `ExchangeError` where no family can, or where the folder holds something.
    """
    check_is_generative(pretrained)
    chosen = choose_family(pretrained.model, family)
    with files.filling(folder):
        to_huggingface(pretrained.tokenizer, folder)
        files.write_weights(folder, *_tensors_to_write(chosen, pretrained, dtype), max_shard_bytes)
        if pretrained.chat_template is not None:
            write_atomic(folder / TEMPLATE, pretrained.chat_template)
        ids = _special_ids(pretrained)
        _write_json(folder / GENERATION, pretrained.extra_generation_config | _recommendations(pretrained) | ids)
        _write_json(folder / CONFIG, _settings(chosen, pretrained.model) | {"torch_dtype": dtype} | ids)


def _settings(family: Family, config: ModelConfig) -> dict[str, Any]:
    assert family.write is not None
    values = family.write(dataclasses.replace(plain(model), dropout=model.dropout, init_std=model.init_std))
    return {"architectures": [family.architecture], "model_type": family.name} | values


def _tensors_to_write(
    family: Family, pretrained: Pretrained, dtype: str
) -> tuple[dict[str, int], Iterator[tuple[str, np.ndarray]]]:
    """The bytes of every tensor of the files, by its name, and the tensors in the same order."""
    model = pretrained.model
    biased = dataclasses.replace(model, bias=True) if model.norm == "layernorm" else model  # theirs always has biases
    tensors, shapes, kind = family.tensors(biased), weight_shapes(biased), jnp.dtype(dtype)
    params = {leaf_name(path): x for path, x in jax.tree.leaves_with_path(pretrained.params)}
    order = [(t, i) for t in tensors for i in range(model.num_layers if t.layered else 1)]
    order.sort(key=lambda one: (one[0].layered, one[1]))  # layer by layer, so that a file has whole layers

    def weight(name: str, layer: int | None) -> np.ndarray:
        if name not in params:
            return np.zeros(shapes[name], kind)
        whole = np.asarray(params[name])
        return (whole if layer is None else whole[layer]).astype(kind, copy=False)

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for t, i in order:
            yield name_of(t, i), t.join([weight(w, i if t.layered else None) for w in t.weights])

    def name_of(t: Tensor, i: int) -> str:
        return family.full_name(t.name.format(i=i))

    sizes = {name_of(t, i): int(np.prod(t.shape(shapes[t.weights[0]]))) * kind.itemsize for t, i in order}
    return sizes, stream()


def _special_ids(pretrained: Pretrained) -> dict[str, Any]:
    t = pretrained.tokenizer
    ends = list(dict.fromkeys([*([] if t.eos_id is None else [t.eos_id]), *pretrained.stop_tokens]))
    return {"bos_token_id": t.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def _recommendations(pretrained: Pretrained) -> dict[str, Any]:
    """`recommended` as generation_config.json has it; what transformers has no field for is left out."""
    found = {name: value for name, value in pretrained.recommended.items() if name in RECOMMENDED}
    if found.get("temperature") == 0:
        return {name: value for name, value in found.items() if name != "temperature"} | {"do_sample": False}
    return found | ({"do_sample": True} if found.keys() & {"temperature", "top_k", "top_p", "min_p"} else {})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(values, indent=2) + "\n")
