"""The sampling options of `gptjax sample` and `gptjax chat`."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import tyro

from gptjax.commands import check_unused
from gptjax.commands.options import FloatOption, IntOption
from gptjax.errors import PromptError

if TYPE_CHECKING:
    from gptjax.inference.generator import Generator
    from gptjax.inference.sampling import SamplingParams

NEEDS_SAMPLING = ("top_k", "top_p", "min_p", "seed")  # options without effect in greedy decoding
DEFAULT_TEMPERATURE = 0.8


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen. None: the model's own default if it has one, else off (temperature: 0.8)."""

    temperature: FloatOption = None  # divides the logits; 0 is greedy decoding
    top_k: IntOption = None  # sample from the k most likely tokens only
    top_p: FloatOption = None  # sample from the most likely tokens that together have this probability
    min_p: FloatOption = None  # sample from tokens at least this many times as likely as the most likely one
    repetition_penalty: FloatOption = None  # above 1: makes tokens that are in the text less likely
    presence_penalty: FloatOption = None  # subtracted from the logits of tokens in the continuation
    frequency_penalty: FloatOption = None  # the same, once for each occurrence
    no_repeat_ngram_size: IntOption = None  # forbid n-grams of this size to occur twice
    logit_bias: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ID:X ...")] = ()  # added to the logits of tokens


class HasSampling(Protocol):
    """The options of a command with a `sampling` group."""

    @property
    def sampling(self) -> SamplingOptions: ...


def unused_when_greedy(options: HasSampling) -> dict[str, Iterable[str]]:
    """Options without effect because of --temperature 0, for `check_unused`."""
    if options.sampling.temperature != 0:
        return {}
    return {"no effect with --temperature 0, which is greedy decoding": NEEDS_SAMPLING}


def sampling_params(options: HasSampling, generator: "Generator") -> "SamplingParams":
    """The options, with the model's own defaults. Raises `GptjaxError` for options without effect."""
    from gptjax.inference.generator import resolve_sampling_params

    given: dict[str, Any] = dataclasses.asdict(options.sampling)
    given["logit_bias"] = tuple(map(_parse_bias, options.sampling.logit_bias)) or None
    if given["temperature"] is None and "temperature" not in generator.pretrained.generation_config:
        given["temperature"] = DEFAULT_TEMPERATURE
    params = resolve_sampling_params(generator.pretrained, **given)
    if params.temperature == 0:
        reason = "no effect, because the model's own generation config has temperature 0; set --temperature"
        check_unused(options, {reason: NEEDS_SAMPLING})
    return params


def open_generator(model: str, checkpoint: str, dtype: str | None) -> "Generator":
    from gptjax.inference.generator import Generator
    from gptjax.interop.open import open_model

    return Generator(open_model(model, checkpoint), dtype)


def read_file(path: Path, option: str) -> str:
    """The text of a file. Raises `PromptError` with the option's name."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise PromptError(f"{option} = {str(path)!r}: cannot be read ({e})") from None


def _parse_bias(text: str) -> tuple[int, float]:
    try:
        token, value = text.split(":")
        return int(token), float(value)
    except ValueError:
        raise PromptError(f"logit_bias: {text!r} is not ID:NUMBER, such as 50256:-100") from None
