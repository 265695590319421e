"""Experiment files are Python: a module that defines `experiment`. Only files that the user names are ever executed."""

import importlib
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from gptjax.config import Experiment, Search
from gptjax.errors import ConfigError, GptjaxError
from gptjax.schema import leaves, unknown


def load_experiment(name: str) -> Experiment:
    """The experiment of a file (`experiments/quickstart.py`) or of its dotted name (`experiments.quickstart`).

    Also of a run's or a trial's JSON. Raises `ConfigError` for a file that is missing, fails, or has no `experiment`.
    """
    if name.endswith(".json") and Path(name).is_file():
        try:
            return Experiment.from_json(Path(name).read_text(encoding="utf-8"))
        except ConfigError as e:
            raise ConfigError([f"{name}: {problem}" for problem in e.problems]) from None
        except (ValueError, TypeError, AttributeError, RecursionError) as e:
            raise ConfigError([f"{name}: is no experiment ({e})"]) from None
    path, experiment = defined(name, "experiment")
    if not isinstance(experiment, Experiment):
        more = "; it holds a sweep: gptjax sweep" if defined(name, "sweep")[1] is not None else ""
        raise ConfigError(
            [f"{path}: defines no `experiment`; it must hold a line `experiment = Experiment(...)`{more}"]
        )
    return experiment


def load_sweep(name: str) -> list[Experiment]:
    """The experiments of a sweep's file or of its dotted name. Raises `ConfigError` where it defines no `sweep`."""
    path, sweep = defined(name, "sweep")
    if sweep is None and isinstance(defined(name, "search")[1], Search):
        raise ConfigError([f"{path}: defines a `search` and no `sweep`: choose how by --search tpe, random or halving"])
    if not isinstance(sweep, list | tuple) or not sweep or not all(isinstance(e, Experiment) for e in sweep):
        raise ConfigError(
            [f"{path}: defines no `sweep`; it must hold a line `sweep = grid(...)`, or `zip_(...)`, or experiments"]
        )
    return list(sweep)


def runs_folder(name: str) -> Path:
    """Where the runs of a file, or of its dotted name, go by default."""
    return Path("runs") / name.removesuffix(".py").replace("/", ".").rpartition(".")[2]


def load_search(name: str) -> Search:
    """The search of a file or of its dotted name. Raises `ConfigError` where it defines no `search`."""
    path, search = defined(name, "search")
    if not isinstance(search, Search):
        raise ConfigError([f"{path}: defines no `search`; it must hold a line `search = Search(experiment, ...)`"])
    return search


def defined(name: str, attribute: str) -> tuple[Path, Any]:
    """What a file calls by a name; None where there is nothing of that name."""
    path = Path(name) if name.endswith(".py") or "/" in name else Path(*name.split(".")).with_suffix(".py")
    if not path.is_file():
        raise ConfigError(
            [f"{path}: no such experiment file; experiments/quickstart.py is one in a checkout of gptjax"]
        )
    try:
        return path, getattr(_import(path.resolve()), attribute, None)
    except GptjaxError:
        raise
    except Exception as e:
        raise ConfigError([_what_failed(path.resolve(), e)]) from None


def _import(path: Path) -> ModuleType:
    """Imports a file under its full name in its package, so that it can build on its neighbours."""
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").exists():
        parts.insert(0, root.name)
        root = root.parent
    if len(parts) > 1:
        sys.path.insert(0, str(root))
        module = importlib.import_module(".".join(parts))
        if module.__file__ and Path(module.__file__).resolve() == path:
            return module
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _what_failed(path: Path, e: Exception) -> str:
    if isinstance(e, SyntaxError):
        return f"{e.filename}, line {e.lineno}: {e.msg}"
    frames = [f for f in traceback.extract_tb(e.__traceback__) if Path(f.filename) == path]
    where = f"{path.name}, line {frames[-1].lineno}" if frames else str(path)
    if argument := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(e)):
        section, field = argument.groups()
        prefix = "" if section == "Experiment" else f"{section.lower()}."
        return f"{where}: {unknown(prefix + field, list(leaves(Experiment)))}"
    return f"{where}: {type(e).__name__}: {e}"
