"""Peak FLOP/s and peak memory of the devices."""

import resource
import sys
import time

import jax
import jax.numpy as jnp

from gptjax.sharding import one_device

# Dense bfloat16 peak of one device in FLOP/s, from the vendors' data sheets. The first name that is part of JAX's name
# of the device is used, so a longer name comes before the shorter ones that it contains.
PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "4090": 165e12,
    "V100": 125e12,
    "TPU v6": 918e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v4": 275e12,
}


def peak_flops() -> tuple[float, str]:
    """The peak FLOP/s of all devices, and its source: a data sheet, or a measured float32 product on one device.

    A CPU counts once, since the product uses all its cores.
    """
    device = jax.devices()[0]
    for kind, peak in PEAKS.items():
        if kind.lower() in device.device_kind.lower():
            return peak * jax.device_count(), f"{kind} data sheet, bfloat16"
    size, multiply, seconds = 1024, jax.jit(lambda a: a @ a), []
    with jax.set_mesh(one_device()):
        a = jnp.ones((size, size))
        multiply(a).block_until_ready()
        began = time.perf_counter()
        multiply(a).block_until_ready()
        first = time.perf_counter() - began
        for _ in range(max(3, min(10, int(0.05 / first)))):
            began = time.perf_counter()
            multiply(a).block_until_ready()
            seconds.append(time.perf_counter() - began)
    devices = 1 if device.platform == "cpu" else jax.device_count()
    return devices * 2 * size**3 / min(seconds), "measured on a 1024 x 1024 float32 product"


def memory_bytes() -> int:
    """Peak memory so far: of one device if it reports it, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
