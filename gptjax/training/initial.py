"""Fine-tuning: the config, the tokenizer and the weights of the initial model.

An experiment with `init` inherits the model's config. It may choose the fields in `OVERRIDABLE`; every other field that
it sets must have the same value. Weights are copied where their shapes agree. New are the vocabulary rows that an
objective adds, and a head with other outputs (other labels, or labels in place of tokens). Of a table of positions as
many rows are copied as the context needs.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array

from gptjax.config import Experiment, ModelConfig
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import ConfigError
from gptjax.inference.pretrained import Pretrained
from gptjax.model.gpt import weight_axes
from gptjax.training.run import Run
from gptjax.training.state import leaf_name

OVERRIDABLE = (
    "dropout", "remat", "attention_kernel", "vocab_size", "num_classes", "lora_rank", "lora_alpha", "lora_targets",
)  # fmt: skip
OVERRIDABLE_IF_GIVEN = ("context_length", "layers", "dtype")  # by default inherited
HEADS = ("embedding.head", "embedding.transform", "classifier")  # prefixes of the names of head weights
ModelLoader = Callable[[str], Pretrained]  # opens a model by the name in `Experiment.init`


@dataclass(frozen=True)
class InitialModel:
    """The model that training starts from; its weights are read when `open` is called."""

    model: ModelConfig
    tokenizer: Tokenizer
    open: Callable[[], Pretrained]


def initial_model(experiment: Experiment, run: Run | None, open_init: ModelLoader) -> InitialModel | None:
    """The initial model of an experiment, or of its existing run; None if it starts from random weights."""
    name = experiment.init
    if name is None:
        return None
    opened = functools.cache(lambda: open_init(name))
    if run is not None:
        return InitialModel(run.experiment.model, run.tokenizer(), opened)
    return InitialModel(opened().model, opened().tokenizer, opened)


def inherit_config(experiment: Experiment, model: ModelConfig) -> Experiment:
    """The experiment with the config of this model.

    Raises `ConfigError` with every field to which the experiment gives another value.
    """
    default, inherited = ModelConfig(), model.resolved()
    given = {f.name: getattr(experiment.model, f.name) for f in dataclasses.fields(default)}
    chosen = {name: value for name, value in given.items() if value != getattr(default, name)}
    wrong = [
        f"model.{name} = {value}: the model of init = {experiment.init!r} has {getattr(inherited, name)}; leave it out"
        for name, value in chosen.items()
        if name not in OVERRIDABLE + OVERRIDABLE_IF_GIVEN and value != getattr(inherited, name)
    ]
    if wrong:
        raise ConfigError(wrong)
    own = {name: given[name] for name in OVERRIDABLE}
    own |= {name: chosen[name] for name in OVERRIDABLE_IF_GIVEN if name in chosen}
    if inherited.positions == "rope" and inherited.rope_scaling == "none":
        own["rope_original_length"] = None  # follows the context length
    return dataclasses.replace(experiment, model=dataclasses.replace(inherited, **own))


def backbone_params(pretrained: Pretrained, experiment: Experiment) -> Any:
    """The weights to start from: without the head, if the experiment has other outputs than the model."""
    wanted = experiment.data.labels if experiment.data.answers == "classes" else ()
    if pretrained.labels == wanted:
        return pretrained.params
    kept = {name: part for name, part in pretrained.params.items() if not name.startswith(HEADS)}
    embedding = {name: table for name, table in kept["embedding"].items() if not f"embedding.{name}".startswith(HEADS)}
    return kept | {"embedding": embedding}


def init_mismatches(loaded: Any, wanted: Any, model: ModelConfig) -> list[str]:
    """Why loaded weights do not fit a model: one line per weight."""
    there = {leaf_name(path): x.shape for path, x in jax.tree.leaves_with_path(loaded)}
    here = {leaf_name(path): x.shape for path, x in jax.tree.leaves_with_path(wanted)}
    axes = {
        leaf_name(path): names
        for path, names in jax.tree.leaves_with_path(weight_axes(model), is_leaf=lambda x: isinstance(x, tuple))
    }
    return [
        f"{name}: {there.get(name)} in init, {here.get(name)} here"
        for name in sorted(there | here)
        if "_lora_" not in name
        and not (name.startswith(HEADS) and name not in there)
        and (name not in there or name not in here or not _fits(axes[name], there[name], here[name]))
    ]


def _fits(axes: tuple[str, ...], there: tuple[int, ...], here: tuple[int, ...]) -> bool:
    def fits(axis: str, loaded: int, wanted: int) -> bool:
        if axis == "vocab":  # an objective may add rows
            return loaded <= wanted
        if axis == "positions":  # the context may be shorter
            return loaded >= wanted
        return loaded == wanted

    return len(there) == len(here) and all(map(fits, axes, there, here))


def merge_params(loaded: Any, fresh: Any) -> Any:
    """Loaded weights with the shapes and shardings of new ones; new weights where none are loaded."""
    there = {leaf_name(path): x for path, x in jax.tree.leaves_with_path(loaded)}

    def merge(path: tuple[Any, ...], new: Array) -> Array:
        name = leaf_name(path)
        if name not in there:
            return new
        values = np.asarray(there[name], np.float32)
        if values.shape != new.shape:
            padded = np.array(jax.device_get(new))
            common = tuple(slice(min(a, b)) for a, b in zip(values.shape, padded.shape, strict=True))
            padded[common] = values[common]
            values = padded
        return jax.device_put(values, new.sharding)

    return jax.tree.map_with_path(merge, fresh)
