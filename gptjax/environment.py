"""What decides the bits of a run besides its experiment and its data: versions, devices and settings of jax."""

import os
from importlib import metadata
from typing import Any

import jax

from gptjax.errors import warn

PACKAGES = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# settings that environment variables can change, and that the programs of gptjax are written for
PINNED = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
}
SETTINGS = (*PINNED, "jax_default_matmul_precision")
KEYS = ("versions", "devices", "processes", "settings")


def pin() -> None:
    """Sets what gptjax needs, and warns where an environment variable says something else."""
    for name, needed in PINNED.items():
        if (value := _setting(name)) != needed:
            warn(f"{name.upper()} = {value}: has no effect; gptjax needs {needed}")
            jax.config.update(name, needed)


def environment() -> dict[str, Any]:
    """The environment of this process, as JSON has it: the values of `KEYS`."""
    device = jax.devices()[0]
    return {
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "devices": {"count": jax.device_count(), "kind": device.device_kind, "platform": device.platform},
        "processes": jax.process_count(),
        "settings": {"XLA_FLAGS": os.environ.get("XLA_FLAGS")} | {name: _setting(name) for name in SETTINGS},
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How an environment differs from one that was recorded earlier, perhaps with fewer keys."""
    found = []
    for key in KEYS:
        old, new = before.get(key, now[key]), now[key]
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{name} {old[name]!r} -> {new[name]!r}" for name in new if old.get(name, new[name]) != new[name]]
        elif old != new:
            found.append(f"{key} {old!r} -> {new!r}")
    return found


def _setting(name: str) -> Any:
    value = getattr(jax.config, name)
    return getattr(value, "value", value)  # some are enums
