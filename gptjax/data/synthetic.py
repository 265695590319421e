"""Synthetic text: a Python function of (seed, index) as the source.

`function:PACKAGE.MODULE:NAME` calls NAME(0, 0), NAME(0, 1), ... for `data.max_documents` documents; `:SEED` at the end
sets another seed. The function returns a text, or a dict of columns for `data.prompt` and `data.answer`. It must be
pure: its documents are generated several times and identified by their hash. Its module is imported, and so executed:
only for the user's own experiment, never for an untrusted run folder (`training/run.py`).
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from gptjax.config import DataConfig
from gptjax.errors import DataError

PREFIX = "function:"


def is_function(source: str) -> bool:
    """Whether a source is a function."""
    return source.startswith(PREFIX)


def generate_documents(source: str, data: DataConfig) -> Iterator[tuple[Any, str]]:
    """The documents that the function of a source returns, each with its origin for messages.

    Raises `DataError` for a function that cannot be found, that fails, or that returns anything else.
    """
    function, seed = _find(source)
    if data.max_documents is None:
        raise DataError(
            f"data.source = {source!r}: has no end; set data.max_documents to the number of documents to generate"
        )
    for index in range(data.max_documents):
        where = f"{source.removeprefix(PREFIX)}, index {index}"
        try:
            document = function(seed, index)
        except Exception as e:  # from the user's function
            raise DataError(f"{where}: the function fails ({type(e).__name__}: {e}); correct it") from e
        if not isinstance(document, str | dict):
            raise DataError(f"{where}: returns {document!r}; a text or a dict of columns is needed")
        yield document, where


def _find(source: str) -> tuple[Callable[[int, int], Any], int]:
    module, name, *rest = [*source.removeprefix(PREFIX).split(":"), ""][:4]
    seed = rest[0] if rest else "0"
    if not (module and name) or not (seed or "0").isdecimal() or source.count(":") > 3:
        raise DataError(f"data.source = {source!r}: is not of the form function:PACKAGE.MODULE:NAME or ...:NAME:SEED")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as e:  # from the user's module
        raise DataError(f"data.source = {source!r}: cannot be imported ({type(e).__name__}: {e})") from None
    if not callable(found):
        raise DataError(f"data.source = {source!r}: is not a function of (seed, index), but {found!r}")
    return found, int(seed or "0")
