"""Short labels for the variants of a sweep: `swiglu, lr 0.001` for `sw-ffn=swiglu-learning_rate=0.001`."""

import re
from collections.abc import Mapping, Sequence

from gptjax.errors import printable

SHORT = {  # field -> how a label calls it
    "learning_rate": "lr", "final_learning_rate": "final lr", "warmup_steps": "warmup", "weight_decay": "wd",
    "batch_size": "batch", "num_layers": "layers", "num_heads": "heads", "num_kv_heads": "kv heads",
    "context_length": "context",
}  # fmt: skip


def plain(name: str, most: int = 40) -> str:
    """A name as a plot shows it: as it is written, not as a formula, and cut where it is too long."""
    shown = printable(name[:most]) + ("..." if len(name) > most else "")
    return shown.replace("\n", " ").replace("$", r"\$")


def short_labels(names: Sequence[str]) -> list[str]:
    """A label for each variant's name: the values of the fields that differ. The names themselves if that is unclear.

    Only names made by `grid` and `zip_` are shortened, BASE-FIELD=VALUE-..., and only if all have the same BASE.
    """
    parsed = [_parse(name) for name in names]
    if len({base for base, _ in parsed}) != 1 or len(names) < 2:
        return list(names)
    fields = dict.fromkeys(field for _, values in parsed for field in values)
    varied = [field for field in fields if len({values.get(field) for _, values in parsed}) > 1]
    named = [field for field in varied if not all(_explains_itself(field, values) for _, values in parsed)]
    labels = []
    for base, values in parsed:
        parts = [f"{_short(f)} {values[f]}" if f in named else values[f] for f in varied if f in values]
        labels.append(", ".join(parts) or base)
    return labels if len(set(labels)) == len(names) else list(names)


def _parse(name: str) -> tuple[str, Mapping[str, str]]:
    """The base of a variant's name, and its values by field."""
    base, *parts = re.split(r"-(\w+)=", name)
    return base, dict(zip(parts[::2], parts[1::2], strict=True))


def _explains_itself(field: str, values: Mapping[str, str]) -> bool:
    """Whether a value needs no field name: a word such as `swiglu`, which no other field of the variant has."""
    value = values.get(field, "")
    is_word = re.fullmatch(r"([A-Za-z]\w*)?", value) and value not in ("True", "False", "None", "nan", "inf")
    return bool(is_word) and list(values.values()).count(value) <= 1


def _short(field: str) -> str:
    return SHORT.get(field, field.replace("_", " "))
