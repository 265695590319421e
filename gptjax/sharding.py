"""The devices as a `data` x `model` mesh, and the one table that maps named axes of arrays to axes of the mesh.

Weights and activations name their axes (`("embed", "heads", "head_dim")`); their layout follows from `RULES`. The mesh
is in Auto mode: XLA inserts the collectives, and the constraints here say how arrays are laid out.

The cores of a CPU are a third mesh axis. XLA uses several cores only inside large products. So each core becomes a JAX
device with a copy of the weights and its own rows of the batch, and their gradients are summed (`sum_over_cores`).
For the experiment and its `mesh.data` a CPU is still one device.
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

from gptjax import cpu
from gptjax.config import MeshConfig
from gptjax.errors import RunError

CORES = "cores"
BYTES_PER_WEIGHT = 28  # on each core: the weight, two moments, the gradient, and two buffers of its sum over cores
RULES: dict[str, str | tuple[str, ...] | None] = {
    # weights (`model.axes` has their sizes): "embed" over data is FSDP, the others over model are tensor parallelism
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
    """Connects to the other processes of a multi-host job.

    Under Slurm this needs no settings. Elsewhere three variables say who they are: JAX_COORDINATOR_ADDRESS (host:port
    of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address:
        num_processes, process_id = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        jax.distributed.initialize(address, num_processes, process_id)
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        jax.distributed.initialize()


def on_first_process(action: Callable[[], Any]) -> Any:
    """Calls `action` on process 0 only. All processes return its result, or raise its error.

    The result must be JSON. A `GptjaxError` keeps its type on process 0 and is a `RunError` on the others.
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
    """Returns when every process of the job has called this function with this name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def num_devices() -> int:
    """Devices of a mesh: GPUs, or CPUs of processes. A CPU counts once, however many of its cores are devices."""
    return 1 if _cores_are_devices() else jax.device_count()


def _cores_are_devices() -> bool:
    return jax.config.jax_num_cpu_devices > 1 and jax.default_backend() == "cpu" and jax.process_count() == 1


def make_mesh(config: MeshConfig, num_groups: int, num_weights: int) -> jax.sharding.Mesh:
    """All devices as data x model. `checks.check` has verified that the sizes fit.

    On a CPU it uses as many cores as divide `num_groups`, the groups of rows of a batch that must stay together, and as
    fit in a quarter of the memory with their copies of the weights, gradients and moments.
    """
    if not _cores_are_devices():
        return mesh_of(jax.devices(), config.data or jax.device_count() // config.model, config.model)
    max_cores = max(1, min(jax.device_count(), cpu.memory() // 4 // (BYTES_PER_WEIGHT * num_weights)))
    return mesh_of(jax.devices()[: largest_divisor(num_groups, max_cores)], 1, 1)


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`."""
    return next(divisor for divisor in range(limit, 0, -1) if n % divisor == 0)


def mesh_of(devices: Sequence[jax.Device], data: int, model: int) -> jax.sharding.Mesh:
    """These devices as a data x model mesh. If there are more than data x model, the third axis is cores."""
    axes = {CORES: len(devices) // (data * model), "data": data, "model": model}
    return jax.make_mesh((*axes.values(),), (*axes,), axis_types=(AxisType.Auto,) * 3, devices=devices)


def one_device() -> jax.sharding.Mesh:
    """The mesh of this process's first device. On a CPU, XLA uses all cores for it."""
    return mesh_of(jax.local_devices()[:1], 1, 1)


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, bool | str] | None:
    """Compiler options for a step on this mesh.

    On a CPU they keep `optimization_barrier` until operations are fused; XLA would remove it before. If every core is a
    device, they also stop each of them from using the threads of the others.
    """
    if jax.default_backend() != "cpu":
        return None
    options: dict[str, bool | str] = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    if 1 < mesh.shape[CORES] == jax.device_count():
        options["xla_cpu_multi_thread_eigen"] = False
    return options


def sum_over_cores(function: Callable[[Any, Any], Any], batch: Any, replicated: Any, batch_axis: int) -> Any:
    """`function(batch, replicated)`, which returns sums over rows: each core gets its rows, and the sums are added.

    Call it inside `jax.set_mesh`. One `psum` adds all sums at once. Cores wait for each other in every `psum`, and if
    two were ready together, all threads could end up waiting for a thread. XLA combines those that become ready
    together.
    """

    def on_core(batch: Any, replicated: Any) -> Any:
        return jax.lax.psum(jax.lax.optimization_barrier(function(batch, replicated)), CORES)

    return _on_each_core(function, on_core, batch, replicated, batch_axis, PartitionSpec())


def map_over_cores(function: Callable[[Any, Any], Any], batch: Any, replicated: Any, batch_axis: int) -> Any:
    """As `sum_over_cores`, but scalar sums are returned per core: [cores], or scalars if there is one core."""

    def on_core(batch: Any, replicated: Any) -> Any:
        return jax.tree.map(lambda x: x[None], function(batch, replicated))

    return _on_each_core(function, on_core, batch, replicated, batch_axis, PartitionSpec(CORES))


def _on_each_core(
    on_one_core: Callable[[Any, Any], Any],
    on_core: Callable[[Any, Any], Any],
    batch: Any,
    replicated: Any,
    batch_axis: int,
    out_specs: PartitionSpec,
) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape[CORES] == 1:
        return on_one_core(batch, replicated)
    in_specs = (PartitionSpec(*[None] * batch_axis, CORES), PartitionSpec())
    return jax.shard_map(on_core, in_specs=in_specs, out_specs=out_specs, check_vma=False)(batch, replicated)


def num_batch_devices() -> int:
    """How many devices share the batch that a function inside jit sees; 1 if it runs once per core."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["model"]


def global_row_index(num_rows: int) -> jax.Array:
    """Index in the full batch of each row that a function sees: int32 [rows]. It depends on the core."""
    index = jnp.arange(num_rows)
    one_per_core = CORES in jax.sharding.get_abstract_mesh().manual_axes
    return index + num_rows * jax.lax.axis_index(CORES) if one_per_core else index


def on_one_device(tree: Any) -> Any:
    """Arrays on the mesh of `one_device`."""
    return jax.device_put(tree, NamedSharding(one_device(), PartitionSpec()))


def partition_spec(axes: tuple[str, ...], shape: tuple[int, ...], mesh_shape: dict[str, int]) -> PartitionSpec:
    """The layout of an array with these named axes. An axis that its mesh axis does not divide is not sharded.

    Raises `ValueError` if two axes of the array map to the same mesh axis.
    """
    targets = [RULES[axis] for axis in axes]
    sharded = [target for target in targets if target]
    if len(sharded) != len(set(sharded)):
        raise ValueError(f"sharding.RULES maps two of the axes {axes} to the same mesh axis: {targets}")

    def size(target: str | tuple[str, ...] | None) -> int:
        return math.prod(mesh_shape[t] for t in ([target] if isinstance(target, str) else target or ()))

    return PartitionSpec(*(t if n % size(t) == 0 else None for t, n in zip(targets, shape, strict=True)))


def named_sharding(axes: tuple[str, ...], shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """`partition_spec` on a mesh of devices."""
    return NamedSharding(mesh, partition_spec(axes, shape, dict(mesh.shape)))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Constrains the layout of an activation inside jit. Does nothing outside `jax.set_mesh` and per core."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, dict(mesh.shape)))


def shard_from_host(tree: Any, axes: tuple[str, ...], mesh: jax.sharding.Mesh) -> Any:
    """Shards arrays that every process has in full in its host memory; all have the same named axes."""

    def shard(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, named_sharding(axes, x.shape, mesh), lambda index: x[index])

    return jax.tree.map(shard, tree)
