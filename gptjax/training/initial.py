"""What fine-tuning starts from: the shape, the tokenizer and the weights of another model.

An experiment with `init` takes the model's shape from there: of `ModelConfig` it decides `OVERRIDABLE` alone, and every other field
that it gives must say the same. Weights fit where shapes agree; rows that an objective adds to the vocabulary are new,
and of a table of positions as many rows are taken as the context needs. A head that tells other things than the model's
own, other labels or labels in the place of tokens, is new.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array

from gptjax import config
from gptjax.config import Experiment
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import ConfigError
from gptjax.inference.pretrained import Pretrained
from gptjax.model.gpt import weight_axes
from gptjax.training.run import Run
from gptjax.training.state import leaf_name

OVERRIDABLE = (
    "dropout", "remat", "attention_kernel", "vocab_size", "num_classes", "lora_rank", "lora_alpha", "lora_targets",
)  # fmt: skip
OVERRIDABLE_IF_GIVEN = ("context_length", "layers", "dtype")  # else the model's
HEADS = ("embedding.head", "embedding.transform", "classifier")  # what the names of weights of a head begin with
ModelLoader = Callable[[str], Pretrained]  # a model by the name that `Experiment.init` has for it


@dataclass(frozen=True)
class InitialModel:
    """The model that training starts from; its weights are read when they are asked for."""

    model: config.ModelConfig
    tokenizer: Tokenizer
    open: Callable[[], Pretrained]


def initial_model(experiment: Experiment, run: Run | None, open_init: ModelLoader) -> InitialModel | None:
    """What an experiment starts from, or a run of it that stands there already; None: from random weights."""
    if (name := experiment.init) is None:
        return None
    opened = functools.cache(lambda: open_init(name))
    if run is not None:
        return InitialModel(run.experiment.model, run.tokenizer(), opened)
    return InitialModel(opened().model, opened().tokenizer, opened)


def inherit_config(experiment: Experiment, model: config.ModelConfig) -> Experiment:
    """The experiment with the shape of this model.

    Raises `ConfigError` with every field that the experiment has otherwise.
    """
    plain, theirs = config.ModelConfig(), model.resolved()
    given = {f.name: getattr(experiment.model, f.name) for f in dataclasses.fields(plain)}
    chosen = {name: value for name, value in given.items() if value != getattr(plain, name)}
    if wrong := [
        f"model.{name} = {value}: the model of init = {experiment.init!r} has {getattr(theirs, name)}; leave it out"
        for name, value in chosen.items()
        if name not in OVERRIDABLE + OVERRIDABLE_IF_GIVEN and value != getattr(theirs, name)
    ]:
        raise ConfigError(wrong)
    own = {name: given[name] for name in OVERRIDABLE} | {
        name: chosen[name] for name in OVERRIDABLE_IF_GIVEN if name in chosen
    }
    if theirs.positions == "rope" and theirs.rope_scaling == "none":
        own["rope_original_length"] = None  # follows the context length
    return dataclasses.replace(experiment, model=dataclasses.replace(theirs, **own))


def backbone_params(pretrained: Pretrained, experiment: Experiment) -> Any:
    """The weights of a model to start from: without its head, where the experiment's tells other things."""
    wanted = experiment.data.labels if experiment.data.answers == "classes" else ()
    if pretrained.labels == wanted:
        return pretrained.params
    kept = {n: part for n, part in pretrained.params.items() if not n.startswith(HEADS)}
    tables = kept["embedding"].items()
    return kept | {"embedding": {n: part for n, part in tables if not f"embedding.{n}".startswith(HEADS)}}


def weight_mismatches(loaded: Any, wanted: Any, model: config.ModelConfig) -> list[str]:
    """Why weights cannot be those of a model, a line for each that does not fit."""
    there = {leaf_name(path): x.shape for path, x in jax.tree.leaves_with_path(loaded)}
    here = {leaf_name(path): x.shape for path, x in jax.tree.leaves_with_path(wanted)}
    axes = {
        leaf_name(path): names
        for path, names in jax.tree.leaves_with_path(weight_axes(model), is_leaf=lambda x: isinstance(x, tuple))
    }
    return [
        f"{name}: {there.get(name)} there, {here.get(name)} here"
        for name in sorted(there | here)
        if "_lora_" not in name
        and not (name.startswith(HEADS) and name not in there)
        and (name not in there or name not in here or not _fits(axes[name], there[name], here[name]))
    ]


def _fits(axes: tuple[str, ...], there: tuple[int, ...], here: tuple[int, ...]) -> bool:
    def side(axis: str, theirs: int, ours: int) -> bool:
        return theirs <= ours if axis == "vocab" else theirs >= ours if axis == "positions" else theirs == ours

    return len(there) == len(here) and all(map(side, axes, there, here))


def merge_params(loaded: Any, fresh: Any) -> Any:
    """Loaded weights in the shape and layout of new ones; what they do not have stays new."""

    there = {leaf_name(path): x for path, x in jax.tree.leaves_with_path(loaded)}

    def fit(path: tuple[Any, ...], ours: Array) -> Array:
        if (name := leaf_name(path)) not in there:
            return ours
        values = np.asarray(there[name], np.float32)
        if values.shape != ours.shape:
            whole = np.array(jax.device_get(ours))
            common = tuple(slice(min(a, b)) for a, b in zip(values.shape, whole.shape, strict=True))
            whole[common] = values[common]
            values = whole
        return jax.device_put(values, ours.sharding)

    return jax.tree.map_with_path(fit, fresh)
