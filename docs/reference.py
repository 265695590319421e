"""The pages of the reference, made from the code: fields of `Experiment`, options of commands, the Python API."""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import gptjax
from gptjax import cli, config


class Field(typing.NamedTuple):
    """One field of a dataclass, as a row of a table."""

    name: str
    type: str
    default: str
    comment: str
    is_positional: bool = False


class _Parsed(Exception):
    """Carries the dataclass of a command's options."""

    def __init__(self, kind: type):
        self.kind = kind


def pages() -> dict[str, str]:
    """Path of a page -> its Markdown."""
    return {
        "reference/experiment.md": experiment_page(),
        "reference/commands.md": commands_page(),
        "reference/api.md": api_page(),
    }


def experiment_page() -> str:
    """Every field of `Experiment`, a table for each section."""
    lines = [
        "# Experiment fields",
        "",
        "Made from `gptjax/config.py`. Set a field in a file with `override`, or on the command line of "
        "`gptjax train` as `--section.field VALUE`.",
        "",
    ]
    for f in fields_of(config.Experiment):
        if not _is_section(config.Experiment, f.name):
            continue
        section = type(getattr(config.Experiment(), f.name))
        lines += [f"## {f.name}", "", inspect.getdoc(section) or "", "", *_table(fields_of(section), f"{f.name}."), ""]
    top = [f for f in fields_of(config.Experiment) if not _is_section(config.Experiment, f.name)]
    head = ["## Top level", "", *_table(top), ""]
    return "\n".join(lines[:4] + head + lines[4:])


def commands_page() -> str:
    """Every option of every command."""
    lines = ["# Commands", "", "Made from the options of the commands. `gptjax COMMAND --help` shows the same.", ""]
    for command in cli.COMMANDS:
        kind = options_of(command)
        lines += [f"## gptjax {command}", "", inspect.getdoc(kind) or "", ""]
        rows = list(option_rows(kind))
        arguments = [row for row in rows if row.is_positional]
        options = [row for row in rows if not row.is_positional]
        lines += [*_table(arguments, first="argument"), ""] if arguments else []
        lines += [*_table(options, first="option"), ""] if options else []
        if command == "train":
            lines += ["Every [field of the experiment](experiment.md) is an option too: `--section.field VALUE`.", ""]
    return "\n".join(lines)


def api_page() -> str:
    """The public Python API; mkdocstrings fills it in."""
    lines = ["# Python API", "", "These names can be imported from `gptjax`.", ""]
    for name in gptjax.__all__:
        if name != "__version__":
            lines += [f"::: {gptjax._MODULE_OF[name]}.{name}", ""]
    return "\n".join(lines)


def options_of(command: str) -> type:
    """The dataclass of a command's options: what the command gives to the parser."""
    module_name, function = cli.COMMANDS[command]
    module: Any = importlib.import_module(module_name)

    def stop(kind: type, arguments: list[str], usage: str) -> None:
        raise _Parsed(kind)

    parse = module.parse
    module.parse = stop
    try:
        getattr(module, function)([])
    except _Parsed as parsed:
        return parsed.kind
    finally:
        module.parse = parse
    raise AssertionError(f"{module_name}.{function} does not parse options")


def option_rows(kind: type, prefix: str = "") -> Iterator[Field]:
    """The options of a dataclass, with those of its groups."""
    hints = typing.get_type_hints(kind, include_extras=True, localns=_namespace(kind))
    for f in fields_of(kind):
        hint = hints[f.name]
        base = _unwrap(hint)
        if dataclasses.is_dataclass(base):
            if base is not config.Experiment:
                yield from option_rows(base, "" if _mentions(hint, "OmitArgPrefixes") else f"{prefix}{f.name}.")
            continue
        name = _argument_name(hint) or f.name
        if _mentions(hint, "Positional"):
            yield f._replace(
                name=(_metavar(hint) or name.upper()).replace("|", " or "),
                is_positional=True,
                comment=_help(hint) or f.comment,
            )
        else:
            flag = f"--{prefix}{name}".replace("_", "-")
            yield f._replace(name=flag, comment=_help(hint) or f.comment)


def fields_of(kind: type) -> list[Field]:
    """The fields of a dataclass with their types, defaults and comments."""
    hints = typing.get_type_hints(kind, localns=_namespace(kind))
    comments = comments_of(kind)
    rows = []
    for f in dataclasses.fields(kind):
        rows.append(Field(f.name, _type_text(hints[f.name]), _default_text(f), comments.get(f.name, "")))
    return rows


def comments_of(kind: type) -> dict[str, str]:
    """Field -> the comment at its line, the comment lines above it, or the string below it."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    comments = {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        text = " ".join(_comments(lines[node.lineno - 1 : node.end_lineno]))
        if not text:
            above = node.lineno - 1
            while above > 0 and lines[above - 1].strip().startswith("#"):
                above -= 1
            text = " ".join(_comments(lines[above : node.lineno - 1]))
        if not text and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = str(following.value.value)
        comments[node.target.id] = text
    return comments


def _comments(lines: list[str]) -> list[str]:
    found = []
    for line in lines:
        if match := re.search(r"(?:^\s*|  )# (.*)$", line):
            found.append(match[1])
    return found


def _table(rows: list[Field], prefix: str = "", first: str = "field") -> list[str]:
    lines = [f"| {first} | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        cells = (f"`{prefix}{row.name}`", f"`{row.type}`", f"`{row.default}`" if row.default else "", row.comment)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return lines


def _namespace(kind: type) -> Mapping[str, Any]:
    return vars(sys.modules[kind.__module__])


def _is_section(kind: type, name: str) -> bool:
    return dataclasses.is_dataclass(_unwrap(typing.get_type_hints(kind)[name]))


def _unwrap(hint: Any) -> Any:
    """A type without its annotations."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = hint.__origin__
    return hint


def _marks(hint: Any) -> Iterator[Any]:
    """The annotations of a type, those of inner types too."""
    yield from getattr(hint, "__metadata__", ())
    for inner in typing.get_args(hint):
        if typing.get_origin(inner) is typing.Annotated:
            yield from _marks(inner)


def _mentions(hint: Any, mark: str) -> bool:
    return any(mark in repr(m) for m in _marks(hint)) or mark in repr(hint)


def _configuration(hint: Any, name: str) -> Any:
    values = [getattr(mark, name) for mark in _marks(hint) if getattr(mark, name, None)]
    return values[0] if values else None


def _argument_name(hint: Any) -> str | None:
    name = _configuration(hint, "name")
    return name if isinstance(name, str) else None


def _metavar(hint: Any) -> str | None:
    return _configuration(hint, "metavar")


def _help(hint: Any) -> str | None:
    return _configuration(hint, "help")


def _type_text(hint: Any) -> str:
    hint = _unwrap(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(map(str, arguments))
    if type(None) in arguments:
        return " or ".join(_type_text(a) if a is not type(None) else "None" for a in arguments)
    if origin is tuple:
        return f"({_type_text(arguments[0])}, ...)"
    if arguments:
        return " or ".join(map(_type_text, arguments))
    return getattr(hint, "__name__", str(hint))


def _default_text(f: "dataclasses.Field[Any]") -> str:
    if f.default is not dataclasses.MISSING:
        default = f.default
        return str(default) if isinstance(default, int | float | tuple | type(None)) else repr(str(default))
    return ""
