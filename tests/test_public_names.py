"""The public names of `gptjax`: loaded on first use, all there, and the same for type checkers."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import gptjax


def test_importing_gptjax_loads_nothing():
    code = (
        "import sys; import gptjax; gptjax.__all__; dir(gptjax); "
        "print(sorted({'jax', 'numpy', 'flax', 'tyro', 'gptjax.config'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", gptjax.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(gptjax, name)
    assert name == "__version__" or inspect.getdoc(value)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'gptjax' has no attribute 'nothing'"):
        gptjax.nothing  # noqa: B018


def test_the_stub_lists_the_same_names():
    tree = ast.parse(Path(gptjax.__file__).with_suffix(".pyi").read_text())
    imported = {
        alias.asname: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported == gptjax._MODULE_OF and imported.keys() | {"__version__"} == set(gptjax.__all__)
