"""What the command line can do: one short function a verb, and what they share."""

import logging
import sys
from typing import Any


def parse(kind: Any, arguments: list[str], usage: str) -> Any:
    """The options of a verb from the command line."""
    import tyro

    return tyro.cli(kind, args=arguments, prog=f"gptjax {usage}", config=(tyro.conf.AvoidSubcommands,))


def start_jax() -> None:
    """Quiet libraries, a cache of compiled programs, and the other processes of a cluster job."""
    for name in ("absl", "asyncio"):  # of a save that fails Orbax logs hundreds of lines; gptjax says it in one
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisablehook
    from gptjax import sharding
    from gptjax.training.workshop import enable_compilation_cache

    enable_compilation_cache()
    sharding.join_cluster()


def _unraisablehook(what: "sys.UnraisableHookArgs") -> None:
    """Python's own, but for what TensorStore reports once for every array when a save was given up."""
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)
