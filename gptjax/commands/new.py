"""`gptjax new`: write a starting file for an experiment."""

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from gptjax.atomic_io import write_atomic
from gptjax.commands import parse
from gptjax.errors import GptjaxError

Template = Literal["quickstart", "sweep", "finetune", "claim"]
NEXT: dict[Template, str] = {
    "quickstart": "gptjax train {file}",
    "sweep": "gptjax sweep {file} --seeds 3",
    "finetune": "gptjax train {file} --init MODEL",
    "claim": "gptjax repro {file}",
}


@dataclass(frozen=True)
class Options:
    """Write a commented starting file NAME.py into the current folder. An existing file is never overwritten."""

    name: Annotated[Positional[str], tyro.conf.arg(metavar="NAME")]  # of the experiment: letters, digits, _ and -
    # a training run, a sweep, a fine-tuning run, or the reproduction of a published result
    template: Annotated[Template, tyro.conf.arg(name="from")] = "quickstart"


def new(arguments: list[str]) -> None:
    """NAME -> NAME.py."""
    options: Options = parse(Options, arguments, "new")
    name = options.name.removesuffix(".py")
    if not re.fullmatch(r"[A-Za-z_][\w-]*", name):
        raise GptjaxError(f"{options.name!r} cannot be the name of a file in this folder; use letters, digits, _ and -")
    path = Path(f"{name}.py")
    try:
        write_atomic(path, template(options.template).replace("NAME", name), new=True)
    except FileExistsError:
        raise GptjaxError(f"{path} already exists, and is not overwritten; choose another name") from None
    except OSError as e:
        raise GptjaxError(f"{path}: cannot be written ({e.strerror})") from None
    print(f"{path}: edit it, then {NEXT[options.template].format(file=path)}")


def template(kind: Template) -> str:
    """The text of a template; NAME stands for the name of the experiment."""
    return (files("gptjax.commands") / "templates" / f"{kind}.py").read_text(encoding="utf-8")
