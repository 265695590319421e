"""The runs of a folder as a table: filtered by any field or figure, and sorted."""

import difflib
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from gptjax.config import Experiment
from gptjax.errors import GptjaxError
from gptjax.lab.comparison import BITS
from gptjax.lab.records import Record
from gptjax.lab.text_report import columns
from gptjax.schema import leaves, unknown, value_at

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "!=": operator.ne, "<=": operator.le, ">=": operator.ge, "=": operator.eq, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
OWN = ("name", "state", "step", "started")  # what a record has besides the fields of its experiment and its figures


def value_of(record: Record, field: str) -> Any:
    """`name`, `state`, `step`, `started`, a dotted field of the experiment, or a figure; None where it has none."""
    if field in OWN:
        return getattr(record, field)
    if field in FIELDS:
        return None if record.experiment is None else value_at(record.experiment, field)
    return record.figures.get(field)


FIELDS = leaves(Experiment)


def keep(records: Sequence[Record], filters: Sequence[str]) -> list[Record]:
    """The records that meet every filter, `model.ffn=swiglu` or `val_loss<3`; one without the value meets none of it.

    Raises `GptjaxError` for a filter that cannot be read, or whose field no record has.
    """
    for text in filters:
        field, compare, asked = _read(text)
        check_field(field, records, f"--filter {text!r}")
        if compare not in (operator.eq, operator.ne) and isinstance(asked, str) and field not in OWN:
            raise GptjaxError(f"--filter {text!r}: {asked!r} is no number; < and > compare numbers")
        records = [r for r in records if _meets(value_of(r, field), compare, asked)]
    return list(records)


def _read(text: str) -> tuple[str, Callable[[Any, Any], bool], str | float]:
    """A filter's field, operator and value, which is a number where it reads as one."""
    if (found := re.fullmatch(r"\s*([\w.]+)\s*(!=|<=|>=|==|=|<|>)\s*(.*?)\s*", text)) is None:
        raise GptjaxError(f"--filter {text!r}: is not FIELD=VALUE, or with !=, <, <=, > or >=; val_loss<3 for instance")
    field, sign, value = found.groups()
    try:
        return field, OPERATORS[sign.replace("==", "=")], float(value)
    except ValueError:
        return field, OPERATORS[sign.replace("==", "=")], value


def _meets(value: Any, compare: Callable[[Any, Any], bool], asked: str | float) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool) and isinstance(asked, float):
        return compare(value, asked)
    if isinstance(asked, float):
        return compare in (operator.eq, operator.ne) and value is not None and compare(_text(value), f"{asked:g}")
    return (value is not None or asked.lower() == "none") and compare(_text(value), asked.lower())


def _text(value: Any) -> str:
    return (",".join(map(str, value)) if isinstance(value, tuple) else str(value)).lower()


def check_field(field: str, records: Sequence[Record], option: str) -> None:
    """Raises `GptjaxError` for what is neither a field nor a figure of any record."""
    figures = {name for r in records for name in r.figures}
    if not records or field in OWN or field in FIELDS or field in figures:
        return
    if near := difflib.get_close_matches(field, [*OWN, *FIELDS, *figures], 1, 0.6):
        raise GptjaxError(f"{option}: {field}: no such field or figure; did you mean {near[0]}?")
    raise GptjaxError(f"{option}: {unknown(field, list(FIELDS))}; or one of " + ", ".join([*OWN, *sorted(figures)]))


def ordered(records: Sequence[Record], field: str, reverse: bool = False) -> list[Record]:
    """By a field or figure; those without it come last."""
    check_field(field, records, f"--sort {field}")
    there = [r for r in records if value_of(r, field) is not None]
    rest = [r for r in records if value_of(r, field) is None]
    numeric = all(isinstance(value_of(r, field), int | float) for r in there)
    by = (lambda r: value_of(r, field)) if numeric else (lambda r: _text(value_of(r, field)))
    return sorted(there, key=by, reverse=reverse) + rest


def as_text(records: Sequence[Record]) -> str:
    """One line for each run."""
    head = ["name", "state", "steps", "val loss", "bits a byte", "parameters", "tokens/s", "began (UTC)", ""]
    shown = (("val_loss", ".4f"), (BITS, ".4f"), ("num_params", ",.0f"), ("tokens_per_second", ",.0f"))
    lines = [
        [_plain(r.name), r.state, f"{r.step:,}" if r.experiment and r.state != "missing" else "",
         *(format(r.figures[name], how) if name in r.figures else "" for name, how in shown), _plain(r.started),
         _plain(r.why)]
        for r in records
    ]  # fmt: skip
    return columns([head, *lines])


def _plain(text: str) -> str:
    """Without control characters: names and messages may be a stranger's, and a terminal obeys them."""
    return "".join(c if c.isprintable() else "?" for c in text)


def as_json(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [
        {"name": r.name, "folder": str(r.folder), "state": r.state, "why": r.why, "step": r.step, "started": r.started}
        | {"figures": dict(r.figures)}
        for r in records
    ]
