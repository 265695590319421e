"""LoRA adapters in PEFT's format: what was learnt beside a model of Hugging Face, without the model.

adapter_config.json          ranks and alpha, which modules, and the model that it belongs to
adapter_model.safetensors    for each module A [rank, in] and B [out, rank]: alpha / rank B A is added to its weight

The table of tokens is a module that goes in by tokens and out by its vectors. Where it is the head as well (tied), the
head is a module of its own, with the same two matrices the other way round.

Where a module holds several weights of gptjax (queries, keys and values of GPT-2 and NeoX), the ranks of those that are
targets lie one after the other, and B is 0 where the ranks of one meet the outputs of another: exactly the same sum.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.config import ModelConfig
from gptjax.atomic_io import write_atomic
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
PREFIX = "base_model.model."  # of every tensor: what PEFT's own modules around the model are called
# Which modules there are, the tensors tell; the others say how it was trained.
NO_EFFECT = """task_type peft_version base_model_name_or_path inference_mode lora_dropout fan_in_fan_out target_modules
    exclude_modules layers_to_transform layers_pattern megatron_core qalora_group_size auto_mapping""".split()
OFF: tuple[Any, ...] = (None, False, {}, [])  # of all that is not understood


def save_adapter(pretrained: Pretrained, folder: Path, base: str, base_folder: Path) -> None:
    """Writes what LoRA learnt into a new or empty folder; adapter_config.json comes last.

    `pretrained` has it beside its weights (`open_trained(run, merge=False)`); `base` is the model that it belongs to,
    a folder or a hub name for PEFT to find, and lies in `base_folder`. Raises `ExchangeError` where that is another
    model, or `folder` holds something.
    """
    check_is_generative(pretrained)
    model = pretrained.model
    family = _family_of(base_folder, model)
    weights = {leaf_name(path): np.asarray(x, np.float32) for path, x in jax.tree.leaves_with_path(pretrained.params)}
    tensors: dict[str, np.ndarray] = {}
    for t in _targets(family, model):
        for i in range(model.num_layers if t.layered else 1):
            parts = {
                name: x[i] if t.layered else x
                for name, x in weights.items()
                if name.partition("_lora_")[0] in t.weights
            }
            a, b = _factors(t, model, parts)
            tensors |= zip(_names(family, t, i), (a, b), strict=True)
            if t.weights == TABLE_WEIGHT and (head := _tied_head(family, model)):
                tensors |= zip(_names(family, head), (b.T.copy(), a.T.copy()), strict=True)
    with files.filling(folder):
        files.write_file(folder / WEIGHTS, tensors)
        write_atomic(folder / CONFIG, json.dumps(_settings(family, model, base), indent=2) + "\n")


def base_of_run(run: Run, given: str | None) -> str:
    """The model that the adapter of a run belongs to: `given`, else the one of Hugging Face that the run began with.

    Raises `ExchangeError` for a run without LoRA, and for one that began with another run, which PEFT cannot read.
    """
    e = run.experiment
    if not e.model.lora_rank:
        problem = "was trained without LoRA (model.lora_rank = 0) and has no adapter; export it without --adapter"
        raise ExchangeError(run.folder, [problem])
    base = given or e.init
    assert base is not None  # see checks.py
    if not (Path(base) / EXPERIMENT).is_file():
        return base
    choose_family(_without(e.model))
    problem = f"{base} is a run of gptjax, and PEFT needs a model of transformers to put the adapter on"
    raise ExchangeError(run.folder, [f"{problem}: gptjax export {base} FOLDER, then name it by --base FOLDER"])


def base_of(folder: Path) -> str | None:
    """The model that the adapter in a folder belongs to; None where there is no adapter."""
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
    """The weights of a model with those of an adapter added; what it touches becomes float32.

    Raises `ExchangeError` for an adapter of another kind than LoRA on matrices, or of another model.
    """
    rule, shapes, head = _read_rule(folder), weight_shapes(model), _tied_head(family, model)
    found = {leaf_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(params)}
    changed: dict[str, np.ndarray] = {}
    with files.Weights(folder, WEIGHTS) as weights:
        left = set(weights.tensors)
        for t in family.tensors(model):
            shape = shapes[t.weights[0]]
            for i in range(model.num_layers if t.layered else 1):
                names = _names(family, t, i)
                if not left.issuperset(names) or len(t.shape(shape)) != 2:  # LoRA is of matrices
                    continue
                left -= set(names)
                sizes = t.shape(shape)[:: 1 if t.linear else -1]
                added = _product(weights, names, *rule.of(_module(family, t, i)), *sizes)
                if head and t.weights == TABLE_WEIGHT:
                    again = _names(family, head)
                    same = left.issuperset(again)
                    if same:
                        other = _product(weights, again, *rule.of(_module(family, head)), *sizes[::-1])
                        same = np.allclose(other.T, added, rtol=1e-4, atol=1e-5 * np.abs(added).max())
                    if not same:
                        problem = f"{names[0]} changes the table of tokens, which is the head of this model as well"
                        raise ExchangeError(folder / WEIGHTS, [f"{problem}, and the head is not changed alike"])
                    left -= set(again)
                for name, part in zip(t.weights, t.split(added if t.linear else added.T, shape), strict=True):
                    if name not in changed:
                        changed[name] = np.array(found[name], np.float32)
                    changed[name][i if t.layered else ...] += part
    if left:
        problem = f"{min(left)} (one of {len(left)}) is nothing that gptjax can add to a {family.name} of this shape"
        raise ExchangeError(folder / WEIGHTS, [problem])
    return nested(found | changed)


def _product(
    weights: files.Weights, names: list[str], rank: int, scale: float, outputs: int, inputs: int
) -> np.ndarray:
    """What an adapter adds to a matrix [out, in]. Raises `ExchangeError` where A or B has another shape."""
    for name, wanted in zip(names, ((rank, inputs), (outputs, rank)), strict=True):
        if (there := weights.tensors[name]).shape != wanted:
            problem = f"{name} has shape {list(there.shape)}; {CONFIG} and the model ask for {list(wanted)}"
            raise ExchangeError(there.path, [problem])
    a, b = (weights.read(name).astype(np.float32) for name in names)
    return scale * (b @ a)


def _family_of(folder: Path, config: ModelConfig) -> Family:
    """The family of an adapter's model. Raises `ExchangeError` where that is not the shape that LoRA was trained on."""
    family, theirs = read_config(folder)
    different = differences(_without(model), theirs)
    different.pop("context_length", None)  # the adapter does not depend on it
    if different:
        told = [f"model.{name} = {there!r}, and the run has {here!r}" for name, (here, there) in different.items()]
        mend = "name that one by --base, or export the run without --adapter"
        raise ExchangeError(folder, [f"is not the model that LoRA was trained on ({'; '.join(told)}); {mend}"])
    return family


def _without(config: ModelConfig) -> ModelConfig:
    """A model without LoRA."""
    return dataclasses.replace(model, lora_rank=0)


def _targets(family: Family, config: ModelConfig) -> list[Tensor]:
    """The tensors in which LoRA learnt something, those of all layers as one."""
    return [t for t in family.tensors(_without(model)) if _learnt(t, model)]


def _learnt(t: Tensor, config: ModelConfig) -> list[str]:
    possible = t.layered or t.weights == TABLE_WEIGHT
    return [name for name in t.weights if possible and name.rpartition(".")[2] in model.lora_targets]


def _tied_head(family: Family, config: ModelConfig) -> Tensor | None:
    """The module that is the head of a model and shares the table of tokens; None where the head is its own."""
    if not model.tie_embeddings:
        return None
    (table,) = (t.name for t in family.tensors(_without(model)) if t.weights == TABLE_WEIGHT)
    return Tensor(next(copy for copy, original in family.copies.items() if original == table), TABLE_WEIGHT)


def _factors(t: Tensor, config: ModelConfig, parts: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A [rank, in] and B [out, rank] for one layer's tensor; `parts`: the two small matrices of each weight in it."""
    chosen, rank = _learnt(t, model), model.lora_rank
    down = np.concatenate([parts[f"{name}_lora_down"].reshape(-1, rank) for name in chosen], 1)
    shape = parts[f"{chosen[0]}_lora_up"].shape[1:]  # of the outputs: the same for all weights that share a tensor
    ups = {name: np.zeros((rank * len(chosen), *shape), np.float32) for name in t.weights}
    for i, name in enumerate(chosen):
        ups[name][i * rank : (i + 1) * rank] = parts[f"{name}_lora_up"]
    rows = dataclasses.replace(t, weights=tuple(f"{name}_lora_up" for name in ups), linear=True)
    return np.ascontiguousarray(down.T), rows.join(list(ups.values()))


def _module(family: Family, t: Tensor, layer: int = 0) -> str:
    """The module of transformers that has a tensor as its weight."""
    return family.full_name(t.name.format(i=layer)).removesuffix(".weight")


def _names(family: Family, t: Tensor, layer: int = 0) -> list[str]:
    """What A and B of a module are called."""
    looked_up = t.weights == TABLE_WEIGHT and t.name not in family.copies
    kinds = ("lora_embedding_A", "lora_embedding_B") if looked_up else ("lora_A.weight", "lora_B.weight")
    return [f"{PREFIX}{_module(family, t, layer)}.{kind}" for kind in kinds]


def _settings(family: Family, config: ModelConfig, base: str) -> dict[str, Any]:
    """adapter_config.json: the largest rank for all modules, and a pattern for each that has another."""
    learnt = _targets(family, model)
    if (head := _tied_head(family, model)) and any(t.weights == TABLE_WEIGHT for t in learnt):
        learnt.append(head)
    targets = {t.name.rpartition("{i}.")[2].removesuffix(".weight"): t for t in learnt}
    shares = {module: len(_learnt(t, model)) for module, t in targets.items()}
    most = max(shares.values())
    fewer = {module: n for module, n in shares.items() if n < most}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.causal else None,
        "base_model_name_or_path": base,
        "r": most * model.lora_rank,
        "lora_alpha": most * model.lora_alpha,  # over r it is the same for all
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(t.layered and not t.linear for t in learnt),  # GPT-2's Conv1D
        "target_modules": list(targets),
        "rank_pattern": {module: n * model.lora_rank for module, n in fewer.items()},
        "alpha_pattern": {module: n * model.lora_alpha for module, n in fewer.items()},
        "inference_mode": True,
    }


@dataclass(frozen=True)
class _Rule:
    """The ranks in an adapter_config.json, and what B A is multiplied by."""

    rank: int
    alpha: float
    ranks: dict[str, int]  # by the endings of modules' names
    alphas: dict[str, float]
    rooted: bool  # alpha / sqrt(rank), Kalajdzievski 2023

    def of(self, module: str) -> tuple[int, float]:
        """Rank and factor of a module."""
        rank, alpha = _match(self.ranks, module, self.rank), _match(self.alphas, module, self.alpha)
        return rank, alpha / (rank**0.5 if self.rooted else rank)


def _match(patterns: dict[str, Any], module: str, usual: Any) -> Any:
    return next((x for ending, x in patterns.items() if f".{module}".endswith(f".{ending}")), usual)


def _read_rule(folder: Path) -> _Rule:
    """Raises `ExchangeError` with every field that changes what the adapter does and is not understood."""
    f = Fields(files.read_object(folder, CONFIG) or {})
    rule = _Rule(
        f.need("r", int, 1),
        f.need("lora_alpha", float, 1.0),
        f.take("rank_pattern", dict, {}),
        f.take("alpha_pattern", dict, {}),
        f.take("use_rslora", bool, False),
    )
    for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        for ending, value in f.values.get(name, {}).items():
            if not (re.fullmatch(r"[\w.]+", ending) and conforms(value, kind) and value > 0):
                f.problem(name, "gptjax has ends of modules' names with numbers above 0 only")
    f.inert(peft_type=("LORA",), bias=("none",), init_lora_weights=(True, False, "gaussian", None))
    f.ignore(*NO_EFFECT)
    known = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "bias", "init_lora_weights"}
    f.inert(**{name: OFF for name in f.values.keys() - known - set(NO_EFFECT)})
    if problems := f.finish():
        raise ExchangeError(folder / CONFIG, problems)
    return rule
