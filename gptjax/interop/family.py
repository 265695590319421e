"""What a family of models is, and what several of them share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gptjax.config import ModelConfig
from gptjax.interop.fields import Fields
from gptjax.interop.layout import Tensor

ACTIVATIONS = {  # theirs -> ours; the first of several is the one that is written
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
    """One `model_type` of transformers."""

    name: str
    architecture: str  # the class that has its language-model head
    read: Callable[[Fields], ModelConfig]  # problems go into the fields; the model is resolved
    write: Callable[[ModelConfig], dict[str, Any]] | None  # None: read only
    tensors: Callable[[ModelConfig], list[Tensor]]
    prefix: str  # of the tensors of its body, which some files leave out
    outside: tuple[str, ...]  # names, and beginnings of names, that have no prefix
    buffers: str  # a pattern of what files hold besides the weights, without effect on the logits
    renamed: tuple[tuple[str, str], ...] = ()  # endings of older files, and what they are now
    copies: dict[str, str] = field(default_factory=dict)  # what tied models may hold twice -> the tensor it must equal
    folded: dict[str, str] = field(default_factory=dict)  # a table whose first row is added to every row of another
    without_head: str = ""  # what to say where nothing but the head is missing

    def canonical(self, name: str) -> str:
        """A tensor's name without the prefix, as `tensors` has it."""
        for old, new in self.renamed:
            name = name.removesuffix(old) + new if name.endswith(old) else name
        return name.removeprefix(self.prefix)

    def full_name(self, name: str) -> str:
        """A tensor's name as transformers writes it."""
        return name if name.startswith(self.outside) else self.prefix + name


def norm(theirs: str, ours: str, bias: bool = True) -> list[Tensor]:
    tensors = [Tensor(f"{theirs}.weight", (f"{ours}.scale",)), Tensor(f"{theirs}.bias", (f"{ours}.bias",))]
    return tensors[: 1 + bias]


def linear(theirs: str, ours: str, bias: bool = True) -> list[Tensor]:
    tensors = [Tensor(f"{theirs}.weight", (ours,), linear=True), Tensor(f"{theirs}.bias", (f"{ours}_bias",))]
    return tensors[: 1 + bias]


def head(config: ModelConfig, theirs: str) -> list[Tensor]:
    return [] if config.tie_embeddings else [Tensor(theirs, ("embedding.head",), linear=True)]


def word(words: dict[str, str], ours: str) -> str:
    """What they call an activation; where they have none, a wrong one, which `inexpressible` then names."""
    return next((theirs for theirs, mine in words.items() if mine == ours), next(iter(words)))


def same_rate(f: Fields, *names: str, default: float) -> float:
    """Dropout, where all of theirs are the same; else 0: gptjax has one for all, and the logits do not depend on it."""
    rates = {float(f.take(name, float, default)) for name in names}
    return rates.pop() if len(rates) == 1 else 0.0
