"""The devices as a `data` x `model` mesh, and the one table that says which axis of an array lies along which.

Weights and activations name their axes (`("embed", "heads", "head_dim")`); everything about their layout follows from
`RULES`. The mesh is in Auto mode: XLA places the collectives, the constraints here say where arrays must lie.

The cores of a CPU are a third axis. XLA lets them work together in large products only; so each core is made a
JAX device, has a copy of the weights and rows of the batch of its own, and their gradients are added up (`sum_over_cores`).
For the experiment, and for whoever writes `mesh.data`, a CPU stays one device.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gptjax import config, cpu
from gptjax.errors import RunError

CORES = "cores"
BYTES_PER_WEIGHT = 28  # of each core: the weight, two moments, its gradient, and that again before and after it is added
RULES: dict[str, str | tuple[str, ...] | None] = {
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
    "batch": (CORES, "data"),
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


def num_devices() -> int:
    """What a mesh is made of: GPUs, or processes' CPUs, of which one counts once however many cores are devices."""
    return 1 if _cores_are_devices() else jax.device_count()


def _cores_are_devices() -> bool:
    return jax.config.jax_num_cpu_devices > 1 and jax.default_backend() == "cpu" and jax.process_count() == 1


def make_mesh(mesh: config.MeshConfig, groups: int, weights: int) -> jax.sharding.Mesh:
    """All devices as data x model. `checks.check` has made sure that the numbers fit.

    On a CPU as many cores work at once as divide the `groups` of a batch, rows that belong together, and as copies of
    so many weights, each with its gradient and moments, take a quarter of the memory.
    """
    if not _cores_are_devices():
        return mesh_of(jax.devices(), mesh.data or jax.device_count() // mesh.model, mesh.model)
    most = max(1, min(jax.device_count(), cpu.memory() // 4 // (BYTES_PER_WEIGHT * weights)))
    return mesh_of(jax.devices()[: largest_divisor(groups, most)], 1, 1)


def largest_divisor(groups: int, most: int) -> int:
    """How many, at most so many, share things evenly: cores the groups of a batch, blocks the tokens of a text."""
    return next(n for n in range(most, 0, -1) if groups % n == 0)


def mesh_of(devices: Sequence[jax.Device], data: int, model: int) -> jax.sharding.Mesh:
    """These devices as a data x model mesh; what they are more than data x model are cores."""
    axes = {CORES: len(devices) // (data * model), "data": data, "model": model}
    return jax.make_mesh((*axes.values(),), (*axes,), axis_types=(AxisType.Auto,) * 3, devices=devices)


def one_device() -> jax.sharding.Mesh:
    """The mesh of this process's first device, for what needs no more. All cores of a CPU help this one."""
    return mesh_of(jax.local_devices()[:1], 1, 1)


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, bool | str] | None:
    """For a step on this mesh. On CPUs `optimization_barrier` holds: XLA would take it out before it joins operations.

    Where every core is a device, none of them asks the others for help.
    """
    if jax.default_backend() != "cpu":
        return None
    alone = {"xla_cpu_multi_thread_eigen": False} if 1 < mesh.shape[CORES] == jax.device_count() else {}
    return {"xla_disable_hlo_passes": "cse_barrier_expander", **alone}


def sum_over_cores(function: Callable[[Any, Any], Any], rows: Any, whole: Any, batch_axis: int) -> Any:
    """`function(rows, whole)`, sums over rows: each core is given its own, and all of `whole`; the sums are added.

    Inside `jax.set_mesh`. They are added all at once: cores wait for each other at every addition, and where two could
    be made at once, all threads may come to wait for a thread. XLA makes one of those that become ready together.
    """

    def added(rows: Any, whole: Any) -> Any:
        return jax.lax.psum(jax.lax.optimization_barrier(function(rows, whole)), CORES)

    return _on_each_core(function, added, rows, whole, batch_axis, PartitionSpec())


def map_over_cores(function: Callable[[Any, Any], Any], rows: Any, whole: Any, batch_axis: int) -> Any:
    """As `sum_over_cores`, but the sums, scalars, are left as they are: [cores], or scalars where there is one."""

    def apart(rows: Any, whole: Any) -> Any:
        return jax.tree.map(lambda x: x[None], function(rows, whole))

    return _on_each_core(function, apart, rows, whole, batch_axis, PartitionSpec(CORES))


def _on_each_core(
    alone: Callable[[Any, Any], Any],
    together: Callable[[Any, Any], Any],
    rows: Any,
    whole: Any,
    batch_axis: int,
    out: PartitionSpec,
) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[CORES] == 1:
        return alone(rows, whole)
    given = (PartitionSpec(*[None] * batch_axis, CORES), PartitionSpec())
    return jax.shard_map(together, in_specs=given, out_specs=out, check_vma=False)(rows, whole)


def num_batch_devices() -> int:
    """The devices that share what a function inside jit sees as a whole batch; on one of several cores 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["model"]


def global_row_index(rows: int) -> jax.Array:
    """Of rows that a function is given, those in the whole batch: int32 [rows]. They differ inside `sum_over_cores`."""
    numbers = jnp.arange(rows)
    manual = CORES in jax.sharding.get_abstract_mesh().manual_axes
    return numbers + rows * jax.lax.axis_index(CORES) if manual else numbers


def on_one_device(tree: Any) -> Any:
    """Arrays on the mesh of `one_device`."""
    return jax.device_put(tree, NamedSharding(one_device(), PartitionSpec()))


def partition_spec(axes: tuple[str, ...], shape: tuple[int, ...], mesh_shape: dict[str, int]) -> PartitionSpec:
    """Where an array with these named axes lies. An axis that its mesh axis does not divide stays whole.

    Raises `ValueError` where two axes of one array claim the same mesh axis.
    """
    targets = [RULES[axis] for axis in axes]
    claimed = [target for target in targets if target]
    if len(claimed) != len(set(claimed)):
        raise ValueError(f"axes {axes} claim one mesh axis twice by sharding.RULES: {targets}")

    def size(target: str | tuple[str, ...] | None) -> int:
        return math.prod(mesh_shape[t] for t in ([target] if isinstance(target, str) else target or ()))

    fits = [target if n % size(target) == 0 else None for target, n in zip(targets, shape, strict=True)]
    return PartitionSpec(*fits)


def named_sharding(axes: tuple[str, ...], shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """`partition` on a mesh of devices."""
    return NamedSharding(mesh, partition_spec(axes, shape, dict(mesh.shape)))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Says inside jit how an activation lies. Outside `jax.set_mesh`, and on one core, there is nothing to say."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, dict(mesh.shape)))


def shard_from_host(tree: Any, axes: tuple[str, ...], mesh: jax.sharding.Mesh) -> Any:
    """Lays host arrays, which every process holds whole, out over the mesh; all have the same named axes."""

    def one(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, named_sharding(axes, x.shape, mesh), lambda index: x[index])

    return jax.tree.map(one, tree)
