"""What a CPU has, and what JAX and the allocator are told about it before JAX starts."""

import contextlib
import ctypes
import os
from pathlib import Path

import jax

KEPT = {-1: 2**31 - 1, -4: 0, -8: 1}  # of glibc's mallopt: M_TRIM_THRESHOLD, M_MMAP_MAX and M_ARENA_MAX


def prepare() -> None:
    """Makes every core a JAX device, and keeps memory between steps. Where there are GPUs, those are used."""
    use_cores()
    if not any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd")):
        keep_memory()


def use_cores() -> None:
    """Makes every core that this process may use a JAX device.

    Left alone where JAX_NUM_CPU_DEVICES says how many there are to be (1: XLA shares the cores out as it likes), where
    XLA_FLAGS simulates devices, and in a job of several processes.
    """
    told = jax.config.jax_num_cpu_devices >= 0 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if told or jax.distributed.is_initialized():
        return
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", cores())


def keep_memory() -> None:
    """Lets the process keep the memory that a step gives back: the next one needs as much again.

    Otherwise glibc returns large blocks at once, and every step waits for the system to clear them anew: 14% of the
    time at 10 million parameters. Left alone where the environment sets up an allocator, and without glibc.
    """
    if any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in KEPT.items():
            mallopt(option, value)


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


def _limit(name: str) -> str:
    try:
        return Path("/sys/fs/cgroup", name).read_text()
    except OSError:
        return "max"
