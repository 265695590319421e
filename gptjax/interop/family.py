"""The description of a model family, and helpers that several families share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gptjax.config import ModelConfig
from gptjax.interop.fields import Fields
from gptjax.interop.layout import Tensor

ACTIVATIONS = {  # transformers -> gptjax; an export writes the first of several
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers."""

    name: str
    architecture: str  # its class with a language-model head
    from_hf_config: Callable[[Fields], ModelConfig]  # collects problems in the fields
    to_hf_config: Callable[[ModelConfig], dict[str, Any]] | None  # of a resolved config; None: import only
    tensors: Callable[[ModelConfig], list[Tensor]]
    prefix: str  # of the backbone's tensors; some files omit it
    outside: tuple[str, ...]  # names, or prefixes of names, of tensors outside the backbone
    buffers: str  # a pattern of tensors without effect on the logits
    renamed: tuple[tuple[str, str], ...] = ()  # old and new endings of names
    copies: dict[str, str] = field(
        default_factory=dict
    )  # a duplicate of a tied tensor -> the tensor that it must equal
    folded: dict[str, str] = field(default_factory=dict)  # a table -> the table to whose rows its first row is added
    without_head: str = ""  # the hint if only the head is missing

    def canonical(self, name: str) -> str:
        """A tensor's name without the prefix, as in `tensors`."""
        for old, new in self.renamed:
            name = name.removesuffix(old) + new if name.endswith(old) else name
        return name.removeprefix(self.prefix)

    def full_name(self, name: str) -> str:
        """A tensor's name as in transformers."""
        return name if name.startswith(self.outside) else self.prefix + name


def norm(theirs: str, ours: str, bias: bool = True) -> list[Tensor]:
    tensors = [Tensor(f"{theirs}.weight", (f"{ours}.scale",)), Tensor(f"{theirs}.bias", (f"{ours}.bias",))]
    return tensors[: 1 + bias]


def linear(theirs: str, ours: str, bias: bool = True) -> list[Tensor]:
    tensors = [Tensor(f"{theirs}.weight", (ours,), linear=True), Tensor(f"{theirs}.bias", (f"{ours}_bias",))]
    return tensors[: 1 + bias]


def head(config: ModelConfig, theirs: str) -> list[Tensor]:
    return [] if config.tie_embeddings else [Tensor(theirs, ("embedding.head",), linear=True)]


def hf_name(names: dict[str, str], ours: str) -> str:
    """The name of an activation in transformers; if it has none, another one, which `inexpressible` reports."""
    return next((theirs for theirs, name in names.items() if name == ours), next(iter(names)))


def dropout_rate(f: Fields, *names: str, default: float) -> float:
    """The dropout rate if all rates are the same; else 0: gptjax has one rate, and the logits do not depend on it."""
    rates = {float(f.take(name, float, default)) for name in names}
    return rates.pop() if len(rates) == 1 else 0.0
