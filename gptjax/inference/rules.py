"""The rules by which the next token is chosen: each a pure function of logits and of the text so far.

Their order is that of transformers: repetition, presence and frequency penalties, logit bias, no-repeat n-grams, what a
grammar allows; then, where a token is drawn, temperature, top-k, top-p and min-p. Penalties count as transformers and
the serving engines do: repetition over prompt and continuation, presence and frequency over the continuation only.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax.errors import PromptError


@dataclass(frozen=True)
class Sampling:
    """How the next token of one text is drawn. The defaults leave the model's own distribution alone."""

    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token
    top_k: int | None = None  # only the k likeliest (and any that tie with the last of them)
    top_p: float | None = None  # only the likeliest that together hold this much probability (Holtzman et al. 2020)
    min_p: float | None = None  # only those at least this many times as likely as the likeliest (Nguyen et al. 2024)
    repetition_penalty: float = 1.0  # divides positive logits of tokens in the text, multiplies negative ones (CTRL)
    presence_penalty: float = 0.0  # taken off the logits of tokens that were made already
    frequency_penalty: float = 0.0  # taken off as often as the token was made
    no_repeat_ngram_size: int = 0  # no run of this many tokens occurs twice; 0: any may
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)

    def __post_init__(self) -> None:
        rules = [
            (self.temperature >= 0, "temperature", "must not be negative; 0 takes the likeliest token"),
            (self.top_k is None or self.top_k >= 1, "top_k", "must be at least 1"),
            (self.top_p is None or 0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1"),
            (self.min_p is None or 0 <= self.min_p <= 1, "min_p", "must be at least 0 and at most 1"),
            (self.repetition_penalty > 0, "repetition_penalty", "must be above 0; 1 leaves repetitions alone"),
            (self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size", "must not be negative; 0 lets any repeat"),
        ]
        if wrong := [f"{name} = {getattr(self, name)}: {message}" for holds, name, message in rules if not holds]:
            raise PromptError("\n".join(wrong))
