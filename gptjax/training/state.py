"""The train state: arrays only, each sharded over the mesh by the named axes of its weight."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from gptjax import sharding
from gptjax.config import Experiment
from gptjax.model.axes import AXES
from gptjax.model.gpt import init_params, weight_axes

RECENT = 128  # losses that a new loss is compared with


class Health(NamedTuple):
    """Decides whether the next update is taken."""

    skipped: Array  # int32: skipped updates of the whole run (loss not finite, or a spike)
    in_row: Array  # int32: consecutive skipped updates up to now; checkpoints have this name
    losses: Array  # float32 [RECENT]: a ring buffer of the losses of the last updates taken


class TrainState(NamedTuple):
    """Everything that the next update depends on, except the data."""

    step: Array  # int32: number of batches so far
    params: Any  # float32 weights
    opt_state: Any
    key: Array  # uint32: key data of the run; each use folds in its own name and the step
    health: Health


class Weights(NamedTuple):
    """The state of an imported model, which has no optimizer state."""

    step: Array  # int32: 0
    params: Any  # float32 weights


def new_health() -> Health:
    """Before the first update."""
    return Health(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros(RECENT))


def named_key(key: Array, name: str) -> Array:
    """The random key of one use, from the run's key data."""
    return jax.random.fold_in(jax.random.wrap_key_data(key), zlib.crc32(name.encode()))


def init_state(experiment: Experiment, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    key = jax.random.key_data(jax.random.key(experiment.seed))
    params = init_params(experiment.model, named_key(key, "params"))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), key, new_health())


def abstract_state(experiment: Experiment, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, as `jax.ShapeDtypeStruct`s; nothing is computed.

    Optimizer arrays of the shape of a weight are sharded like the weight. The rest (counters, Adafactor's rows and
    columns) is small, and is replicated.
    """
    shapes = jax.eval_shape(lambda: init_state(experiment, tx))
    axes = {
        _names(path): names
        for path, names in jax.tree.leaves_with_path(
            weight_axes(experiment.model), is_leaf=lambda x: isinstance(x, tuple)
        )
    }
    weights = {_names(path): x.shape for path, x in jax.tree.leaves_with_path(shapes.params)}

    def with_sharding(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = _names(path)
        owner = next((names[i:] for i in range(len(names)) if weights.get(names[i:]) == x.shape), None)
        layout = NamedSharding(mesh, PartitionSpec())
        if owner is not None:
            layout = sharding.named_sharding(axes[owner], x.shape, mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)

    return jax.tree.map_with_path(with_sharding, shapes)


def create_state(experiment: Experiment, tx: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """`init_state`, with each device computing only its own shards. The values do not depend on the mesh."""
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    # It runs once: on a CPU, less optimization halves the compile time, and it runs no slower.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(lambda: init_state(experiment, tx), out_shardings=layout, compiler_options=options)()


def state_mismatches(saved: dict[str, jax.ShapeDtypeStruct], abstract: Any, experiment: Experiment) -> list[str]:
    """How saved arrays differ from the state of an experiment: leaf, both shapes, and the field that decides it."""
    wanted = {leaf_name(path): x for path, x in jax.tree.leaves_with_path(abstract)}
    axes = {
        leaf_name(path): names
        for path, names in jax.tree.leaves_with_path(
            weight_axes(experiment.model), is_leaf=lambda x: isinstance(x, tuple)
        )
    }
    found = []
    for name in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(name), wanted.get(name)
        if there is None or here is None:
            part = "model" if name.startswith("params.") else "optim"
            found.append(f"{name}: {_form(there)} saved, {_form(here)} now; the fields of {part} differ")
        elif there.shape != here.shape:
            owner = next((a for weight, a in axes.items() if name.endswith(f".{weight}")), ())
            sizes = zip(owner, there.shape, here.shape, strict=True) if len(owner) == len(there.shape) else ()
            fields = ", ".join(f"model.{AXES[axis].field}" for axis, x, y in sizes if x != y) or "optim"
            found.append(f"{name}: {_form(there)} saved, {_form(here)} now; decided by {fields}")
        elif there.dtype != here.dtype:
            found.append(f"{name}: {_form(there)} saved, {_form(here)} now; it would need a cast")
    return found


def _form(x: jax.ShapeDtypeStruct | None) -> str:
    return "nothing" if x is None else f"{jnp.dtype(x.dtype).name}{list(x.shape)}"


def leaf_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a leaf, as checkpoints have it: "params.blocks.ffn.up"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The dict keys of a path in a tree, without the fields and indices of the containers around them."""
    return tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))
