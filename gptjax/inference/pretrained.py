"""A model that is ready to use, wherever it came from: what `sample`, `eval`, `chat` and the harness work on."""

from dataclasses import dataclass, field
from typing import Any

from gptjax import config
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import PromptError


@dataclass(frozen=True)
class Pretrained:
    """Weights and all that is needed to use them."""

    name: str  # of the folder or hub repository
    model: config.ModelConfig  # resolved
    params: Any  # as `init_params` makes them; arrays of NumPy or JAX in any float dtype
    tokenizer: Tokenizer
    generation_config: dict[str, Any] = field(default_factory=dict)  # fields of `SamplingParams` that its makers recommend
    stop_tokens: tuple[int, ...] = ()  # ids that end a text, besides `tokenizer.eos_id`
    chat_template: str | None = None  # a Jinja template that turns messages into a prompt
    extra_generation_config: dict[str, Any] = field(default_factory=dict)  # of generation_config.json: kept for an export, not used
    labels: tuple[str, ...] = ()  # the classes that it tells in the place of tokens; (): it tells tokens

    def generation_settings(self) -> dict[str, Any]:
        """How its makers recommend to sample from it, as a run folder keeps it."""
        return {
            "recommended": self.generation_config,
            "stop_tokens": list(self.stop_tokens),
            "chat_template": self.chat_template,
            "passed_on": self.extra_generation_config,
        }


def check_is_generative(pretrained: Pretrained) -> None:
    """Raises `PromptError` for a model with a head for classes, which gives no token a probability."""
    if labels := pretrained.labels:
        shown = ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
        raise PromptError(
            f"{pretrained.name}: tells classes ({shown}) in the place of tokens, so that it can neither write nor "
            "score text, nor be exported as a language model; gptjax eval shows what it can, alone or with --task"
        )
