"""Rewards of sampled answers: a metric of `tuning.scores`, or a function of one's own."""

import importlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from gptjax.errors import ConfigError, GptjaxError

Reward = Callable[[Sequence[str], Sequence[str], Sequence[str]], np.ndarray]  # prompts, samples, answers -> [n]


def make_reward(name: str) -> Reward:
    """A metric of each answer by itself, negated if lower is better; or the function `module:function`.

    The function takes the prompt, the sampled answer and the true answer, and returns a number. Raises `ConfigError`
    for a name that is neither.
    """
    if ":" in name:
        return partial(_call, _find(name))
    try:
        from gptjax.tuning.intervals import LOWER_IS_BETTER
        from gptjax.tuning.scores import METRICS, bleu_of_a_text
    except ModuleNotFoundError as e:
        raise GptjaxError(
            f"objective.reward = {name!r}: needs a library that is not installed ({e}); pip install 'gptjax[tasks]'"
        ) from None
    known = sorted(METRICS.keys() - {"f1"})  # F1 is defined for many answers together
    if name not in known:
        raise ConfigError([f"objective.reward = {name!r}: must be one of {', '.join(known)}, or module:function"])
    metric = bleu_of_a_text if name == "bleu" else METRICS[name]
    sign = -1.0 if name in LOWER_IS_BETTER else 1.0

    def reward(prompts: Sequence[str], samples: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        return sign * metric(samples, [(answer,) for answer in answers], ()).each

    return reward


def _call(
    function: Callable[[str, str, str], float], prompts: Sequence[str], samples: Sequence[str], answers: Sequence[str]
) -> np.ndarray:
    rewards = [function(*row) for row in zip(prompts, samples, answers, strict=True)]
    for reward, sample in zip(rewards, samples, strict=True):
        if not isinstance(reward, int | float | np.number) or not np.isfinite(reward):
            raise GptjaxError(
                f"objective.reward: returned {reward!r} for the answer {sample!r}; it must return a finite number"
            )
    return np.array(rewards, np.float64)


def _find(name: str) -> Callable[[str, str, str], float]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as e:  # of the user's own module
        problem = f"objective.reward = {name!r}: cannot be imported ({type(e).__name__}: {e})"
        raise ConfigError([f"{problem}; name a function as module:function"]) from None
    if not callable(found):
        raise ConfigError(
            [f"objective.reward = {name!r}: must be a function of (prompt, sample, answer), and is {found!r}"]
        )
    return found
