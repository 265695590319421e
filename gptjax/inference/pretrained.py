"""A model that is ready to use, wherever it came from: what `sample`, `eval`, `chat` and the harness work on."""

from dataclasses import dataclass, field
from typing import Any

from gptjax import config
from gptjax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pretrained:
    """Weights and all that is needed to use them."""

    name: str  # of the folder or hub repository
    model: config.Model  # resolved
    params: Any  # as `init_params` makes them; arrays of NumPy or JAX in any float dtype
    tokenizer: Tokenizer
    recommended: dict[str, Any] = field(default_factory=dict)  # fields of `Sampling` that its makers recommend
    stop_tokens: tuple[int, ...] = ()  # ids that end a text, besides `tokenizer.end_of_text`
    chat_template: str | None = None  # a Jinja template that turns messages into a prompt
