"""What a CPU has, and what JAX is told about it before it starts."""

import contextlib
import ctypes
import functools
import os
from pathlib import Path

import jax

COMPILED, LONG = "/jax/core/compile/backend_compile_duration", 0.1  # or loaded from the cache; seconds


def use_cores() -> None:
    """Makes every core that this process may use a JAX device, before JAX starts. Where there are GPUs, those are used.

    Left alone where JAX_NUM_CPU_DEVICES says how many there are to be (1: XLA shares the cores out as it likes), where
    XLA_FLAGS simulates devices, and in a job of several processes.
    """
    told = jax.config.jax_num_cpu_devices >= 0 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if told or jax.distributed.is_initialized():
        return
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", cores())


@functools.cache
def release_after_compiling() -> None:
    """From now on the memory that making a large program took is released before the program runs.

    glibc would keep it: 200 to 250 MB for a training step. Other C libraries are left alone.
    """
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is None:
        return

    def heard(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and duration_secs > LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(heard)


@functools.cache
def bfloat16_matmul_is_fast() -> bool:
    """Whether XLA multiplies large bfloat16 matrices no slower than the same ones in float32.

    It does with AMX, and on AMD's processors with AVX-512's bfloat16 instructions. On Intel's with these alone it takes
    1.7 times as long, and older ones have none. What is neither, or tells nothing of itself, was not measured: taken to
    be quick.
    """
    told = _processor()
    flags = set(next((line for line in told.splitlines() if line.startswith("flags")), "").split())
    return "avx2" not in flags or "amx_bf16" in flags or ("AuthenticAMD" in told and "avx512_bf16" in flags)


def cores() -> int:
    """Those that this process may run on, and that its container (a cgroup) has the time of."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period, *_ = *_limit("cpu.max").split(), "max"
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def memory() -> int:
    """Bytes of the machine, or that its container may use."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    given = _limit("memory.max").strip()
    return machine if given == "max" else min(machine, int(given))


def _processor() -> str:
    return _read(Path("/proc/cpuinfo"), otherwise="")


def _limit(name: str) -> str:
    return _read(Path("/sys/fs/cgroup", name), otherwise="max")


def _read(file: Path, otherwise: str) -> str:
    try:
        return file.read_text()
    except OSError:
        return otherwise
