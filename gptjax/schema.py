"""Nested dataclasses seen as one flat table of dotted names: what `config.py` needs to override, compare and check.

Knows nothing of training; `leaves(Experiment)["model.num_layers"]` is `int`.
"""

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal


def leaves(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf field of a dataclass by its dotted name, with its type."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        found |= leaves(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return found


def value_at(value: Any, path: str) -> Any:
    """The value at a dotted name."""
    for name in path.split("."):
        value = getattr(value, name)
    return value


def replace_at(value: Any, path: str, new: Any) -> Any:
    """A copy of a frozen dataclass with another value at a dotted name."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(value, **{name: replace_at(getattr(value, name), rest, new) if rest else new})


def unknown(path: str, known: list[str]) -> str:
    """The message for a name that does not exist: what may have been meant."""
    section, _, leaf = path.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    same_leaf = [k for k in known if k.rpartition(".")[2] == leaf]
    near = same_leaf or [
        f"{section}.{name}" if section else name
        for name in difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in siblings], 1, 0.6)
    ]
    near = near or difflib.get_close_matches(path, known, 1, 0.6 if not siblings else 1.0)
    if near:
        return f"{path}: no such field; did you mean {near[0]}?"
    if section and siblings:
        return f"{path}: no such field; {section} has {', '.join(k.rpartition('.')[2] for k in siblings)}"
    return f"{path}: no such field; gptjax train FILE --help lists all of them"


def describe(hint: Any) -> str:
    """A type as a person would write it."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if isinstance(hint, types.UnionType):
        return " or ".join(describe(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {describe(typing.get_args(hint)[0])}"
    return "None" if hint is type(None) else hint.__name__


def conforms(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; an int counts as a float, a bool counts as neither."""
    if isinstance(hint, types.UnionType):
        return any(conforms(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(conforms(v, typing.get_args(hint)[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def type_problems(value: Any) -> dict[str, str]:
    """The fields of a nested dataclass whose value is not of the declared type: dotted name -> message."""
    problems: dict[str, str] = {}
    for name, hint in typing.get_type_hints(type(value)).items():
        part = getattr(value, name)
        if not dataclasses.is_dataclass(hint):
            if not conforms(part, hint):
                problems[name] = f"{name} = {part!r}: {describe(hint)} is needed"
        elif isinstance(part, hint):  # type: ignore[arg-type]
            problems |= {f"{name}.{path}": f"{name}.{message}" for path, message in type_problems(part).items()}
        else:
            problems[name] = f"{name} = {part!r}: {describe(hint)}(...) is needed"
    return problems
