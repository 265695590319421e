"""What the command line can do: one short function a verb, and what they share."""

import dataclasses
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gptjax.errors import GptjaxError


def parse(kind: Any, arguments: list[str], usage: str) -> Any:
    """The options of a verb from the command line."""
    import tyro

    return tyro.cli(kind, args=arguments, prog=f"gptjax {usage}", config=(tyro.conf.AvoidSubcommands,))


def check_belongs(options: Any, idle: Mapping[str, Iterable[str]]) -> None:
    """Raises `GptjaxError` with all options that were given and have no place; `idle`: why -> their names."""
    given = _given(options)
    flags = {why: [f"--{name.replace('_', '-')}" for name in names if name in given] for why, names in idle.items()}
    if told := [f"{', '.join(of_it)}: {why}" for why, of_it in flags.items() if of_it]:
        raise GptjaxError("; ".join(told) + "; leave out what has no place")


def _given(options: Any) -> set[str]:
    """The options that differ from their defaults, those in groups among them."""
    found: set[str] = set()
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        found |= _given(value) if dataclasses.is_dataclass(value) else {f.name} if value != f.default else set()
    return found


def is_run(model: str) -> bool:
    """Whether what a user calls a model is a run folder."""
    from gptjax.training.run import EXPERIMENT

    return (Path(model) / EXPERIMENT).is_file()


def without_run(model: str) -> dict[str, Iterable[str]]:
    """What has no place beside a model that is no run, for `check_belongs`."""
    return {} if is_run(model) else {f"no effect, as {model} is no run folder": ["checkpoint"]}


def start_jax() -> None:
    """Quiet libraries, a cache of compiled programs, the other processes of a cluster job, and every core of a CPU."""
    for name in ("absl", "asyncio"):  # of a save that fails Orbax logs hundreds of lines; gptjax says it in one
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisablehook
    from gptjax import cpu, sharding
    from gptjax.training.train_setup import enable_compilation_cache

    enable_compilation_cache()
    sharding.join_cluster()
    cpu.use_cores()
    cpu.release_after_compiling()


def _unraisablehook(what: "sys.UnraisableHookArgs") -> None:
    """Python's own, but for what TensorStore reports once for every array when a save was given up."""
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)
