"""Loads experiment files: Python modules that define `experiment`. Only files that the user names are executed."""

import importlib
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from gptjax.config import Experiment, Search, unknown_field
from gptjax.errors import ConfigError, GptjaxError


def load_experiment(name: str) -> Experiment:
    """The experiment of a file (`experiments/quickstart.py`) or of its dotted name (`experiments.quickstart`).

    Also the JSON of a run or a trial. Raises `ConfigError` for a file that is missing, fails or has no `experiment`.
    """
    if name.endswith(".json") and Path(name).is_file():
        try:
            return Experiment.from_json(Path(name).read_text(encoding="utf-8"))
        except ConfigError as e:
            raise ConfigError([f"{name}: {problem}" for problem in e.problems]) from None
        except (ValueError, TypeError, AttributeError, RecursionError) as e:
            raise ConfigError([f"{name}: is not an experiment ({e})"]) from None
    path, experiment = read_attribute(name, "experiment")
    if not isinstance(experiment, Experiment):
        hint = ""
        if read_attribute(name, "sweep")[1] is not None:
            hint = f"; it has a sweep: gptjax sweep {name}"
        raise ConfigError([f"{path}: defines no `experiment`; it needs a line `experiment = Experiment(...)`{hint}"])
    return experiment


def load_sweep(name: str) -> list[Experiment]:
    """The experiments of `sweep` in a file (or dotted name). Raises `ConfigError` if it defines none."""
    path, sweep = read_attribute(name, "sweep")
    if sweep is None and isinstance(read_attribute(name, "search")[1], Search):
        raise ConfigError(
            [f"{path}: defines a `search` and no `sweep`; choose a method with --search tpe, random or halving"]
        )
    if not isinstance(sweep, list | tuple) or not sweep or not all(isinstance(e, Experiment) for e in sweep):
        raise ConfigError(
            [f"{path}: defines no `sweep`; it needs a line `sweep = grid(...)`, `zip_(...)` or a list of experiments"]
        )
    return list(sweep)


def runs_folder(name: str) -> Path:
    """The default folder for the runs of a file (or dotted name)."""
    return Path("runs") / name.removesuffix(".py").replace("/", ".").rpartition(".")[2]


def load_search(name: str) -> Search:
    """The `search` of a file (or dotted name). Raises `ConfigError` if it defines none."""
    path, search = read_attribute(name, "search")
    if not isinstance(search, Search):
        raise ConfigError([f"{path}: defines no `search`; it needs a line `search = Search(experiment, ...)`"])
    return search


def read_attribute(name: str, attribute: str) -> tuple[Path, Any]:
    """The path of an experiment file, and a global variable of it; None if it has no such variable."""
    path = Path(name) if name.endswith(".py") or "/" in name else Path(*name.split(".")).with_suffix(".py")
    if not path.is_file():
        new = path.stem if path.stem.isidentifier() else "mine"
        raise ConfigError([f"{path}: no such experiment file; `gptjax new {new}` writes a new one, {new}.py"])
    try:
        return path, getattr(_import(path.resolve()), attribute, None)
    except GptjaxError:
        raise
    except Exception as e:
        raise ConfigError([_describe_failure(path.resolve(), e)]) from None


def _import(path: Path) -> ModuleType:
    """Imports a file under its full name in its package, so that it can import its neighbours."""
    root = path.parent
    parts = [path.stem]
    while (root / "__init__.py").exists():
        parts.insert(0, root.name)
        root = root.parent
    if len(parts) > 1:
        sys.path.insert(0, str(root))
        module = importlib.import_module(".".join(parts))
        if module.__file__ and Path(module.__file__).resolve() == path:
            return module
    if len(parts) == 1 and str(root) not in sys.path:
        sys.path.append(str(root))  # for the modules of one's own that it names: objectives, rewards, sources
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _describe_failure(path: Path, e: Exception) -> str:
    if isinstance(e, SyntaxError):
        return f"{e.filename}, line {e.lineno}: {e.msg}"
    frames = [f for f in traceback.extract_tb(e.__traceback__) if Path(f.filename) == path]
    where = f"{path.name}, line {frames[-1].lineno}" if frames else str(path)
    if argument := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(e)):
        section, field = argument.groups()
        prefix = "" if section == "Experiment" else f"{section.removesuffix('Config').lower()}."
        return f"{where}: {unknown_field(prefix + field)}"
    return f"{where}: {type(e).__name__}: {e}"
