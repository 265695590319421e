"""Text made to order: a plain Python function of (seed, index) in the place of files.

`function:PACKAGE.MODULE:NAME` calls NAME(0, 0), NAME(0, 1), ... for `data.max_documents` documents, with `:SEED` behind
it another seed. The function gives a text, or a dict of columns for `data.prompt` and `data.answer`; it is pure, as
its text is made again wherever it is needed and is known by its hash. It is imported and so executed: for an
experiment of one's own, never because of a run folder that may be a stranger's (`training/run.py`).
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from gptjax.config import DataConfig
from gptjax.errors import DataError

PREFIX = "function:"


def is_function(source: str) -> bool:
    """Whether a source names a function."""
    return source.startswith(PREFIX)


def generate_documents(source: str, data: DataConfig) -> Iterator[tuple[Any, str]]:
    """What the function of a source gives, one document after the other, each with where it is from.

    Raises `DataError` naming the source for a function that cannot be found, fails, or gives something else.
    """
    function, seed = _find(source)
    if data.max_documents is None:
        raise DataError(f"data.source = {source!r}: never ends; say by data.max_documents how many documents to make")
    for index in range(data.max_documents):
        where = f"{source.removeprefix(PREFIX)}, index {index}"
        try:
            document = function(seed, index)
        except Exception as e:  # of the user's own function
            raise DataError(f"{where}: the function fails ({type(e).__name__}: {e}); mend it") from e
        if not isinstance(document, str | dict):
            raise DataError(f"{where}: gives {document!r}; a text or a dict of columns is needed")
        yield document, where


def _find(source: str) -> tuple[Callable[[int, int], Any], int]:
    module, name, *rest = [*source.removeprefix(PREFIX).split(":"), ""][:4]
    seed = rest[0] if rest else "0"
    if not (module and name) or not (seed or "0").isdecimal() or source.count(":") > 3:
        raise DataError(f"data.source = {source!r}: is not function:PACKAGE.MODULE:NAME, perhaps with :SEED behind it")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as e:  # of the user's own module
        raise DataError(f"data.source = {source!r}: cannot be imported ({type(e).__name__}: {e})") from None
    if not callable(found):
        raise DataError(f"data.source = {source!r}: is no function of (seed, index), but {found!r}")
    return found, int(seed or "0")
