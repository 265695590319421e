"""What a CPU offers, and the JAX settings that follow from it."""

import contextlib
import ctypes
import functools
import os
from pathlib import Path

import jax

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # or loaded from the cache
MIN_COMPILE_SECONDS = 0.1  # programs that compile faster leave little memory behind


def use_cores() -> None:
    """Makes every core that this process may use a JAX device. Call it before JAX starts. GPUs take precedence.

    Does nothing if JAX_NUM_CPU_DEVICES sets the number (1: XLA distributes its work over the cores), if XLA_FLAGS
    simulates devices, and in a job of several processes.
    """
    is_set = jax.config.jax_num_cpu_devices >= 0 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if is_set or jax.distributed.is_initialized():
        return
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", cores())


@functools.cache
def release_after_compiling() -> None:
    """From now on, the memory used to compile a large program is released before the program runs.

    glibc would keep it: 200 to 250 MB for a training step. Does nothing with other C libraries.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return

    def on_event(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILE_EVENT and duration_secs > MIN_COMPILE_SECONDS:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(on_event)


@functools.cache
def bfloat16_matmul_is_fast() -> bool:
    """Whether XLA multiplies large bfloat16 matrices at least as fast as float32 ones.

    It does with AMX, and on AMD processors with AVX-512's bfloat16 instructions. On Intel processors with only these it
    takes 1.7 times as long, and older processors have neither. Other processors were not measured and count as fast.
    """
    info = _processor()
    flags = set(next((line for line in info.splitlines() if line.startswith("flags")), "").split())
    return "avx2" not in flags or "amx_bf16" in flags or ("AuthenticAMD" in info and "avx512_bf16" in flags)


def cores() -> int:
    """The number of cores that this process may use, within the CPU quota of its container (a cgroup)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period, *_ = *_limit("cpu.max").split(), "max"
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def memory() -> int:
    """The memory of the machine in bytes, within the limit of its container."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _limit("memory.max").strip()
    return machine if limit == "max" else min(machine, int(limit))


def _processor() -> str:
    return _read(Path("/proc/cpuinfo"), default="")


def _limit(name: str) -> str:
    return _read(Path("/sys/fs/cgroup", name), default="max")


def _read(file: Path, default: str) -> str:
    try:
        return file.read_text()
    except OSError:
        return default
