"""A model that is ready to use, from any source: the input of `sample`, `eval`, `chat` and the evaluation harness."""

from dataclasses import dataclass, field
from typing import Any

from gptjax.config import ModelConfig
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import PromptError


@dataclass(frozen=True)
class Pretrained:
    """Weights, and everything needed to use them."""

    name: str  # of the folder or hub repository
    model: ModelConfig  # resolved
    params: Any  # as `init_params` makes them; arrays of NumPy or JAX in any float dtype
    tokenizer: Tokenizer
    generation_config: dict[str, Any] = field(default_factory=dict)  # the model's default `SamplingParams` fields
    stop_tokens: tuple[int, ...] = ()  # ids that end a text, in addition to `tokenizer.eos_id`
    chat_template: str | None = None  # a Jinja template that turns messages into a prompt
    extra_generation_config: dict[str, Any] = field(default_factory=dict)  # not used here; kept for an export
    labels: tuple[str, ...] = ()  # of a classifier; (): a language model

    def generation_settings(self) -> dict[str, Any]:
        """The model's default sampling settings, as a run folder stores them."""
        return {
            "recommended": self.generation_config,
            "stop_tokens": list(self.stop_tokens),
            "chat_template": self.chat_template,
            "passed_on": self.extra_generation_config,
        }


def check_is_generative(pretrained: Pretrained) -> None:
    """Raises `PromptError` for a classifier, which gives tokens no probabilities."""
    if labels := pretrained.labels:
        shown = ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
        raise PromptError(
            f"{pretrained.name}: is a classifier ({shown}). It cannot generate or score text, and cannot be exported "
            "as a language model. Evaluate it with gptjax eval, alone or with --tasks"
        )
