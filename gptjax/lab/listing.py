"""The runs of a folder as a table, filtered and sorted by any field or metric."""

import difflib
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from gptjax.config import RENAMED, Experiment, unknown_field
from gptjax.errors import GptjaxError
from gptjax.lab.comparison import BITS
from gptjax.lab.records import RunRecord
from gptjax.lab.text_report import columns
from gptjax.schema import leaves, value_at

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "!=": operator.ne, "<=": operator.le, ">=": operator.ge, "=": operator.eq, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
RECORD_FIELDS = ("name", "state", "step", "started")  # besides the experiment's fields and the metrics
FIELDS = leaves(Experiment)


def value_of(record: RunRecord, field: str) -> Any:
    """A field of the record (`RECORD_FIELDS`) or of the experiment, or a metric; None if the record has none."""
    if field in RECORD_FIELDS:
        return getattr(record, field)
    if field in FIELDS:
        return None if record.experiment is None else value_at(record.experiment, field)
    return record.final_metrics.get(field)


def filter_records(records: Sequence[RunRecord], filters: Sequence[str]) -> list[RunRecord]:
    """The records that match every filter, for instance `model.ffn=swiglu` or `val_loss<3`.

    A record without the value does not match. Raises `GptjaxError` for a malformed filter and an unknown field.
    """
    for text in filters:
        field, compare, wanted = _parse_filter(text)
        check_field(field, records, f"--filter {text!r}")
        if compare not in (operator.eq, operator.ne) and isinstance(wanted, str) and field not in RECORD_FIELDS:
            raise GptjaxError(f"--filter {text!r}: {wanted!r} is not a number; < and > compare numbers")
        records = [r for r in records if _matches(value_of(r, field), compare, wanted)]
    return list(records)


def _parse_filter(text: str) -> tuple[str, Callable[[Any, Any], bool], str | float]:
    """The field, operator and value of a filter. A value that looks like a number is one."""
    if (found := re.fullmatch(r"\s*([\w.]+)\s*(!=|<=|>=|==|=|<|>)\s*(.*?)\s*", text)) is None:
        raise GptjaxError(
            f"--filter {text!r}: must be FIELD=VALUE, or with !=, <, <=, > or >=, for instance val_loss<3"
        )
    field, sign, value = found.groups()
    try:
        return field, OPERATORS[sign.replace("==", "=")], float(value)
    except ValueError:
        return field, OPERATORS[sign.replace("==", "=")], value


def _matches(value: Any, compare: Callable[[Any, Any], bool], wanted: str | float) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool) and isinstance(wanted, float):
        return compare(value, wanted)
    if isinstance(wanted, float):
        return compare in (operator.eq, operator.ne) and value is not None and compare(_text(value), f"{wanted:g}")
    return (value is not None or wanted.lower() == "none") and compare(_text(value), wanted.lower())


def _text(value: Any) -> str:
    return (",".join(map(str, value)) if isinstance(value, tuple) else str(value)).lower()


def check_field(field: str, records: Sequence[RunRecord], option: str) -> None:
    """Raises `GptjaxError` for a name that is neither a field nor a metric of any record."""
    metrics = {name for r in records for name in r.final_metrics}
    if not records or field in RECORD_FIELDS or field in FIELDS or field in metrics:
        return
    if field in RENAMED:
        raise GptjaxError(f"{option}: {unknown_field(field)}")
    if near := difflib.get_close_matches(field, [*RECORD_FIELDS, *FIELDS, *metrics], 1, 0.6):
        raise GptjaxError(f"{option}: {field}: no such field or metric; did you mean {near[0]}?")
    raise GptjaxError(f"{option}: {unknown_field(field)}; or one of " + ", ".join([*RECORD_FIELDS, *sorted(metrics)]))


def sort_records(records: Sequence[RunRecord], field: str, reverse: bool = False) -> list[RunRecord]:
    """Sorts by a field or metric; records without it come last."""
    check_field(field, records, f"--sort {field}")
    known = [r for r in records if value_of(r, field) is not None]
    missing = [r for r in records if value_of(r, field) is None]
    numeric = all(isinstance(value_of(r, field), int | float) for r in known)

    def key(record: RunRecord) -> Any:
        value = value_of(record, field)
        return value if numeric else _text(value)

    return sorted(known, key=key, reverse=reverse) + missing


def as_text(records: Sequence[RunRecord]) -> str:
    """One line for each run."""
    header = ["name", "state", "step", "val loss", "bits/byte", "parameters", "tokens/s", "started (UTC)", ""]
    formats = (("val_loss", ".4f"), (BITS, ".4f"), ("num_params", ",.0f"), ("tokens_per_second", ",.0f"))
    lines = [
        [_plain(r.name), r.state, f"{r.step:,}" if r.experiment and r.state != "missing" else "",
         *(format(r.final_metrics[name], spec) if name in r.final_metrics else "" for name, spec in formats),
         _plain(r.started), _plain(r.why)]
        for r in records
    ]  # fmt: skip
    return columns([header, *lines])


def _plain(text: str) -> str:
    """Text without control characters: names and messages are untrusted, and a terminal would obey them."""
    return "".join(c if c.isprintable() else "?" for c in text)


def as_json(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    return [
        {"name": r.name, "folder": str(r.folder), "state": r.state, "why": r.why, "step": r.step, "started": r.started}
        | {"figures": dict(r.final_metrics)}  # programs read this key
        for r in records
    ]
