"""The type checker that jaxtyping's import hook puts on modules of gptjax while the tests run; see conftest.py."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for mypy
