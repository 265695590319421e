"""LoRA adapters in PEFT's format, for a base model of Hugging Face.

adapter_config.json          ranks, alpha, target modules and the base model
adapter_model.safetensors    A [rank, in] and B [out, rank] of each module: alpha / rank B A is added to its weight

The token embedding is a module with tokens as inputs and vectors as outputs. If it is tied, the head is a second module
with the same two matrices, transposed and swapped.

Some modules hold several weights of gptjax (query, key and value in GPT-2 and NeoX). Then the ranks of the targets are
concatenated, and B is 0 in the blocks that combine the ranks of one weight with the outputs of another.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.atomic_io import write_atomic
from gptjax.config import ModelConfig
from gptjax.errors import ExchangeError
from gptjax.inference.pretrained import Pretrained, check_is_generative
from gptjax.interop import files
from gptjax.interop.families import differences
from gptjax.interop.family import Family
from gptjax.interop.fields import Fields
from gptjax.interop.huggingface import read_config
from gptjax.interop.layout import Tensor, nested, weight_shapes
from gptjax.interop.saving import choose_family
from gptjax.schema import conforms
from gptjax.training.run import EXPERIMENT, Run
from gptjax.training.state import leaf_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TABLE_WEIGHT = ("embedding.tokens",)
PREFIX = "base_model.model."  # of every tensor, from PEFT's wrapper modules
# The tensors show which modules are adapted; the other fields describe the training.
NO_EFFECT = """task_type peft_version base_model_name_or_path inference_mode lora_dropout fan_in_fan_out target_modules
    exclude_modules layers_to_transform layers_pattern megatron_core qalora_group_size auto_mapping""".split()
OFF: tuple[Any, ...] = (None, False, {}, [])  # allowed values of unknown fields


def save_adapter(pretrained: Pretrained, folder: Path, base: str, base_folder: Path) -> None:
    """Writes the LoRA weights into a new or empty folder; adapter_config.json is written last.

    `pretrained` has unmerged LoRA weights (`open_trained(run, merge=False)`). `base` is the folder or hub name of the
    base model as PEFT will look it up, and `base_folder` its files. Raises `ExchangeError` if the base model does not
    fit, or `folder` is not empty.
    """
    check_is_generative(pretrained)
    config = pretrained.model
    family = _family_of(base_folder, config)
    weights = {leaf_name(path): np.asarray(x, np.float32) for path, x in jax.tree.leaves_with_path(pretrained.params)}
    tensors: dict[str, np.ndarray] = {}
    for t in _targets(family, config):
        for i in range(config.num_layers if t.layered else 1):
            parts = {
                name: x[i] if t.layered else x
                for name, x in weights.items()
                if name.partition("_lora_")[0] in t.weights
            }
            a, b = _factors(t, config, parts)
            tensors |= zip(_names(family, t, i), (a, b), strict=True)
            if t.weights == TABLE_WEIGHT and (head := _tied_head(family, config)):
                tensors |= zip(_names(family, head), (b.T.copy(), a.T.copy()), strict=True)
    with files.fill_folder(folder):
        files.write_file(folder / WEIGHTS, tensors)
        write_atomic(folder / CONFIG, json.dumps(_settings(family, config, base), indent=2) + "\n")


def base_of_run(run: Run, given: str | None) -> str:
    """The base model of a run's adapter: `given`, else the Hugging Face model that the run was initialised from.

    Raises `ExchangeError` for a run without LoRA, and for one initialised from a gptjax run, which PEFT cannot read.
    """
    e = run.experiment
    if not e.model.lora_rank:
        problem = "was trained without LoRA (model.lora_rank = 0) and has no adapter; export it without --adapter"
        raise ExchangeError(run.folder, [problem])
    base = given or e.init
    assert base is not None  # see checks.py
    if not (Path(base) / EXPERIMENT).is_file():
        return base
    choose_family(_without_lora(e.model))
    problem = f"{base} is a run of gptjax, and PEFT needs a transformers model as the base of the adapter"
    raise ExchangeError(run.folder, [f"{problem}: export it with gptjax export {base} FOLDER, then add --base FOLDER"])


def base_of(folder: Path) -> str | None:
    """The base model of the adapter in a folder; None if there is no adapter."""
    if not (folder / CONFIG).is_file():
        return None
    files.check_folder(folder)
    values = files.read_object(folder, CONFIG) or {}
    base = values.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        problem = f"base_model_name_or_path = {base!r}: the folder or hub name of the adapter's model was expected"
        raise ExchangeError(folder / CONFIG, [problem])
    return base


def add_adapter(folder: Path, family: Family, config: ModelConfig, params: Any) -> Any:
    """The weights of a model with an adapter merged into them; changed weights become float32.

    Raises `ExchangeError` for an adapter that is not LoRA on matrices, or of another model.
    """
    scaling = _read_scaling(folder)
    shapes = weight_shapes(config)
    head = _tied_head(family, config)
    found = {leaf_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(params)}
    changed: dict[str, np.ndarray] = {}
    with files.SafetensorsReader(folder, WEIGHTS) as weights:
        weights.check_dtypes()
        left = set(weights.tensors)
        for t in family.tensors(config):
            shape = shapes[t.weights[0]]
            for i in range(config.num_layers if t.layered else 1):
                names = _names(family, t, i)
                if not left.issuperset(names) or len(t.shape(shape)) != 2:  # LoRA adapts matrices only
                    continue
                left -= set(names)
                sizes = t.shape(shape)[:: 1 if t.linear else -1]
                delta = _delta(weights, names, *scaling.of(_module(family, t, i)), *sizes)
                if head and t.weights == TABLE_WEIGHT:
                    head_names = _names(family, head)
                    same = left.issuperset(head_names)
                    if same:
                        other = _delta(weights, head_names, *scaling.of(_module(family, head)), *sizes[::-1])
                        same = np.allclose(other.T, delta, rtol=1e-4, atol=1e-5 * np.abs(delta).max())
                    if not same:
                        problem = f"{names[0]} changes the token embedding, which this model also uses as its head"
                        raise ExchangeError(
                            folder / WEIGHTS, [f"{problem}, but the adapter does not change the head in the same way"]
                        )
                    left -= set(head_names)
                for name, part in zip(t.weights, t.split(delta if t.linear else delta.T, shape), strict=True):
                    if name not in changed:
                        changed[name] = np.array(found[name], np.float32)
                    changed[name][i if t.layered else ...] += part
        left -= _base_copies(weights, family, config, found)
    if left:
        problem = f"{min(left)} (one of {len(left)}) does not fit a {family.name} model of this shape"
        raise ExchangeError(folder / WEIGHTS, [problem])
    return nested(found | changed)


def _base_copies(
    weights: files.SafetensorsReader, family: Family, config: ModelConfig, base: dict[str, np.ndarray]
) -> set[str]:
    """The copies of the base model's embedding and head, which PEFT saves with their LoRA matrices by default.

    Raises `ExchangeError` for a copy that differs from the base model.
    """
    shapes = weight_shapes(config)
    copies = set()
    for t in family.tensors(config):
        name = f"{PREFIX}{_module(family, t)}.base_layer.weight"
        if t.layered or name not in weights.tensors:
            continue
        copy = weights.read_tensor(name)
        parts = t.split(copy, shapes[t.weights[0]]) if copy.shape == t.shape(shapes[t.weights[0]]) else ()
        same = [np.array_equal(part, base[weight]) for weight, part in zip(t.weights, parts, strict=bool(parts))]
        if not same or not all(same):
            problem = f"{name} differs from that of the base model: the adapter was trained on another model"
            raise ExchangeError(weights.tensors[name].path, [problem])
        copies.add(name)
    return copies


def _delta(
    weights: files.SafetensorsReader, names: list[str], rank: int, scale: float, outputs: int, inputs: int
) -> np.ndarray:
    """The matrix [out, in] that an adapter adds. Raises `ExchangeError` if A or B has the wrong shape."""
    for name, expected in zip(names, ((rank, inputs), (outputs, rank)), strict=True):
        info = weights.tensors[name]
        if info.shape != expected:
            problem = f"{name} has shape {list(info.shape)}; {CONFIG} and the model need {list(expected)}"
            raise ExchangeError(info.path, [problem])
    a, b = (weights.read_tensor(name).astype(np.float32) for name in names)
    return scale * (b @ a)


def _family_of(folder: Path, config: ModelConfig) -> Family:
    """The family of an adapter's base model. Raises `ExchangeError` if the adapter was trained on another model."""
    family, base_config = read_config(folder)
    different = differences(_without_lora(config), base_config)
    different.pop("context_length", None)  # adapters do not depend on it
    if different:
        fields = [f"model.{name} = {value!r}, but the run has {ours!r}" for name, (ours, value) in different.items()]
        hint = "name the right one with --base, or export the run without --adapter"
        raise ExchangeError(folder, [f"is not the model that LoRA was trained on ({'; '.join(fields)}); {hint}"])
    return family


def _without_lora(config: ModelConfig) -> ModelConfig:
    """A config without LoRA."""
    return dataclasses.replace(config, lora_rank=0)


def _targets(family: Family, config: ModelConfig) -> list[Tensor]:
    """The tensors that LoRA adapts."""
    return [t for t in family.tensors(_without_lora(config)) if _adapted_weights(t, config)]


def _adapted_weights(t: Tensor, config: ModelConfig) -> list[str]:
    adaptable = t.layered or t.weights == TABLE_WEIGHT
    return [name for name in t.weights if adaptable and name.rpartition(".")[2] in config.lora_targets]


def _tied_head(family: Family, config: ModelConfig) -> Tensor | None:
    """The head of a model, if it is tied to the token embedding; else None."""
    if not config.tie_embeddings:
        return None
    (table,) = (t.name for t in family.tensors(_without_lora(config)) if t.weights == TABLE_WEIGHT)
    return Tensor(next(copy for copy, original in family.copies.items() if original == table), TABLE_WEIGHT)


def _factors(t: Tensor, config: ModelConfig, parts: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A [rank, in] and B [out, rank] for one layer's tensor; `parts`: the two LoRA matrices of each weight in it."""
    chosen = _adapted_weights(t, config)
    rank = config.lora_rank
    down = np.concatenate([parts[f"{name}_lora_down"].reshape(-1, rank) for name in chosen], 1)
    shape = parts[f"{chosen[0]}_lora_up"].shape[1:]  # the output shape: the same for all weights in a tensor
    ups = {name: np.zeros((rank * len(chosen), *shape), np.float32) for name in t.weights}
    for i, name in enumerate(chosen):
        ups[name][i * rank : (i + 1) * rank] = parts[f"{name}_lora_up"]
    rows = dataclasses.replace(t, weights=tuple(f"{name}_lora_up" for name in ups), linear=True)
    return np.ascontiguousarray(down.T), rows.join(list(ups.values()))


def _module(family: Family, t: Tensor, layer: int = 0) -> str:
    """The name of the transformers module of a tensor."""
    return family.full_name(t.name.format(i=layer)).removesuffix(".weight")


def _names(family: Family, t: Tensor, layer: int = 0) -> list[str]:
    """The names of A and B of a module."""
    is_embedding = t.weights == TABLE_WEIGHT and t.name not in family.copies
    kinds = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    return [f"{PREFIX}{_module(family, t, layer)}.{kind}" for kind in kinds]


def _settings(family: Family, config: ModelConfig, base: str) -> dict[str, Any]:
    """adapter_config.json: the largest rank, and a pattern for each module with another rank."""
    tensors = _targets(family, config)
    if (head := _tied_head(family, config)) and any(t.weights == TABLE_WEIGHT for t in tensors):
        tensors.append(head)
    targets = {t.name.rpartition("{i}.")[2].removesuffix(".weight"): t for t in tensors}
    counts = {module: len(_adapted_weights(t, config)) for module, t in targets.items()}
    largest = max(counts.values())
    smaller = {module: n for module, n in counts.items() if n < largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if config.causal else None,
        "base_model_name_or_path": base,
        "r": largest * config.lora_rank,
        "lora_alpha": largest * config.lora_alpha,  # alpha / r is the same for all modules
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(t.layered and not t.linear for t in tensors),  # GPT-2's Conv1D
        "target_modules": list(targets),
        "rank_pattern": {module: n * config.lora_rank for module, n in smaller.items()},
        "alpha_pattern": {module: n * config.lora_alpha for module, n in smaller.items()},
        "inference_mode": True,
    }


@dataclass(frozen=True)
class _Scaling:
    """The ranks and alphas in an adapter_config.json."""

    rank: int
    alpha: float
    ranks: dict[str, int]  # by the suffix of a module's name
    alphas: dict[str, float]
    rank_stabilized: bool  # scale by alpha / sqrt(rank), Kalajdzievski 2023

    def of(self, module: str) -> tuple[int, float]:
        """The rank and the scale of a module."""
        rank = _match(self.ranks, module, self.rank)
        alpha = _match(self.alphas, module, self.alpha)
        return rank, alpha / (rank**0.5 if self.rank_stabilized else rank)


def _match(patterns: dict[str, Any], module: str, default: Any) -> Any:
    return next((x for ending, x in patterns.items() if f".{module}".endswith(f".{ending}")), default)


def _read_scaling(folder: Path) -> _Scaling:
    """Raises `ExchangeError` with every unsupported field that changes the adapter's effect."""
    f = Fields(files.read_object(folder, CONFIG) or {})
    scaling = _Scaling(
        f.need("r", int, 1),
        f.need("lora_alpha", float, 1.0),
        f.take("rank_pattern", dict, {}),
        f.take("alpha_pattern", dict, {}),
        f.take("use_rslora", bool, False),
    )
    for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        for ending, value in f.values.get(name, {}).items():
            if not (re.fullmatch(r"[\w.]+", ending) and conforms(value, kind) and value > 0):
                f.problem(name, "must map the ends of module names to numbers above 0")
    f.inert(peft_type=("LORA",), bias=("none",), init_lora_weights=(True, False, "gaussian", None))
    f.ignore(*NO_EFFECT)
    known = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "bias", "init_lora_weights"}
    f.inert(**{name: OFF for name in f.values.keys() - known - set(NO_EFFECT)})
    if problems := f.finish():
        raise ExchangeError(folder / CONFIG, problems)
    return scaling
