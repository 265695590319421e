"""The commands of the command line: one short function each, and what they share."""

import dataclasses
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gptjax.config import RENAMED, unknown_field
from gptjax.errors import ConfigError, GptjaxError, printable

RENAMED_OPTIONS = {  # command -> old option -> new option
    "train": {"--from-step": "--rollback-to"},
    "sweep": {"--on": "--executor", "--list": "--status"},
    "scale": {"--wait": "--external", "--list": "--status"},
    "eval": {"--task": "--tasks", "--against": "--compare-with"},
}


def parse(kind: Any, arguments: list[str], usage: str) -> Any:
    """Parses the options of a command. Raises `GptjaxError` for an option that has been renamed."""
    import tyro

    check_renamed(usage.split()[0], arguments)
    if problems := [_renamed(argument) for argument in arguments if _renamed(argument)]:
        raise ConfigError(problems)
    return tyro.cli(kind, args=arguments, prog=f"gptjax {usage}", config=(tyro.conf.AvoidSubcommands,))


def _renamed(argument: str) -> str:
    """The message for an option that has a new name; "" for any other argument."""
    path = argument.removeprefix("--").partition("=")[0].replace("-", "_")
    return f"--{unknown_field(path)}" if argument.startswith("--") and path in RENAMED else ""


def check_renamed(command: str, arguments: Iterable[str]) -> None:
    """Raises `GptjaxError` for the old name of an option."""
    renamed = RENAMED_OPTIONS.get(command, {})
    for argument in arguments:
        option = argument.partition("=")[0].replace("_", "-")
        if option in renamed:
            raise GptjaxError(f"{option}: is now called {renamed[option]}")


def check_unused(options: Any, unused: Mapping[str, Iterable[str]]) -> None:
    """Raises `GptjaxError` with all given options that have no effect; `unused`: reason -> names of options."""
    given = _given(options)
    problems = []
    for reason, names in unused.items():
        if flags := [f"--{name.replace('_', '-')}" for name in names if name in given]:
            problems.append(f"{', '.join(flags)}: {reason}")
    if problems:
        raise GptjaxError("; ".join(problems) + "; remove these options")


def _given(options: Any) -> set[str]:
    """The options that differ from their defaults, including those in groups."""
    names: set[str] = set()
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        if dataclasses.is_dataclass(value):
            names |= _given(value)
        elif value != f.default:
            names.add(f.name)
    return names


def is_run(model: str) -> bool:
    """Whether a model name is a run folder."""
    from gptjax.training.run import EXPERIMENT

    return (Path(model) / EXPERIMENT).is_file()


def without_run(model: str) -> dict[str, Iterable[str]]:
    """Options without effect for a model that is not a run folder, for `check_unused`."""
    if is_run(model):
        return {}
    return {f"no effect, because {model} is not a run folder": ["checkpoint"]}


def start_jax() -> None:
    """Sets up JAX: quiet logs, the compilation cache, the processes of a cluster job, and all cores of a CPU."""
    for name in ("absl", "asyncio"):  # Orbax logs hundreds of lines about a failed save; gptjax prints one
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisablehook
    from gptjax import cpu, environment, sharding
    from gptjax.training.train_setup import enable_compilation_cache

    environment.pin()
    enable_compilation_cache()
    sharding.join_cluster()
    cpu.use_cores()
    cpu.release_after_compiling()


def for_terminal(text: str) -> str:
    """Generated text as stdout gets it: exact in a file or a pipe, and without control characters on a terminal."""
    return printable(text) if sys.stdout.isatty() else text


def _unraisablehook(what: "sys.UnraisableHookArgs") -> None:
    """Python's own hook, without the error that TensorStore reports for every array of an aborted save."""
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)
