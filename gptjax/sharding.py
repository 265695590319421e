"""The devices as a `data` x `model` mesh, and the one table that says which axis of an array lies along which.

Weights and activations name their axes (`("embed", "heads", "head_dim")`); everything about their layout follows from
`RULES`. The mesh is in Auto mode: XLA places the collectives, the constraints here say where arrays must lie.
"""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gptjax import config
from gptjax.errors import RunError

RULES: dict[str, str | None] = {
    # weights: "embed" over data is FSDP, the others over model are tensor parallelism
    "layers": None,
    "embed": "data",
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "head_dim": None,
    "ffn": "model",
    "positions": None,
    "rank": None,
    "classes": None,
    # activations
    "microbatch": None,
    "batch": "data",
    "length": None,
    "features": None,
}


def join_cluster() -> None:
    """Finds the other processes of a multi-host job: under Slurm by itself, elsewhere from three variables.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        count, number = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        jax.distributed.initialize(address, count, number)
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        jax.distributed.initialize()


def on_first_process(action: Callable[[], Any]) -> Any:
    """What `action` returns on process 0, the only one to call it, on all of them; what it raises is raised on all.

    The result must be JSON. A `GptjaxError` keeps its kind on process 0 and is a `RunError` elsewhere.
    """
    if jax.process_count() == 1:
        return action()
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except Exception as e:
            error = e
    text = _broadcast(json.dumps([result, error and f"process 0: {error}"]).encode())
    if error is not None:
        raise error
    result, message = json.loads(text)
    if message is not None:
        raise RunError(message)
    return result


def _broadcast(text: bytes) -> bytes:
    from jax.experimental.multihost_utils import broadcast_one_to_all

    size = int(broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    padded[: len(text[:size])] = np.frombuffer(text, np.uint8)[:size]
    return bytes(np.asarray(broadcast_one_to_all(padded), np.uint8))


def wait_for_all(name: str) -> None:
    """Returns when every process of the job has come to the place in the program that has this name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def make_mesh(mesh: config.Mesh) -> jax.sharding.Mesh:
    """All devices as data x model. `checks.check` has made sure that the numbers fit."""
    return mesh_of(jax.devices(), mesh.data or jax.device_count() // mesh.model, mesh.model)


def mesh_of(devices: Sequence[jax.Device], data: int, model: int) -> jax.sharding.Mesh:
    """These devices as a data x model mesh."""
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, model), ("data", "model"), axis_types=types, devices=devices)


def partition(axes: tuple[str, ...], shape: tuple[int, ...], mesh_shape: dict[str, int]) -> PartitionSpec:
    """Where an array with these named axes lies. An axis that its mesh axis does not divide stays whole.

    Raises `ValueError` where two axes of one array claim the same mesh axis.
    """
    targets = [RULES[axis] for axis in axes]
    claimed = [target for target in targets if target]
    if len(claimed) != len(set(claimed)):
        raise ValueError(f"axes {axes} claim one mesh axis twice by sharding.RULES: {targets}")
    fits = [t if t and size % mesh_shape[t] == 0 else None for t, size in zip(targets, shape, strict=True)]
    return PartitionSpec(*fits)


def sharding(axes: tuple[str, ...], shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """`partition` on a mesh of devices."""
    return NamedSharding(mesh, partition(axes, shape, dict(mesh.shape)))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Says inside jit how an activation lies. Outside `jax.set_mesh` there is one device, nothing to say."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, dict(mesh.shape)))


def place(tree: Any, axes: tuple[str, ...], mesh: jax.sharding.Mesh) -> Any:
    """Lays host arrays, which every process holds whole, out over the mesh; all have the same named axes."""

    def one(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding(axes, x.shape, mesh), lambda index: x[index])

    return jax.tree.map(one, tree)
