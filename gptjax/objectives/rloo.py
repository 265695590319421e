"""RLOO: policy gradient with a leave-one-out baseline (Williams 1992; Kool et al. 2019; Ahmadian et al. 2024)."""

import numpy as np

from gptjax.objectives.on_policy import OnPolicy


def leave_one_out_advantages(
    rewards: np.ndarray, log_ratios: np.ndarray, weights: np.ndarray, beta: float
) -> np.ndarray:
    """Reward minus beta times the log-ratio to the reference, minus the mean of that over the other answers.

    Rewards [prompts, samples], log-ratios and weights [answers, length] -> float32 [answers, length], the same at every
    token of an answer. An unbiased gradient of E[reward] - beta KL(model || reference).
    """
    penalized = rewards - beta * log_ratios.sum(-1).reshape(rewards.shape)
    others = (penalized.sum(1, keepdims=True) - penalized) / (penalized.shape[1] - 1)
    return (weights * (penalized - others).reshape(-1, 1)).astype(np.float32)


class RLOO(OnPolicy):
    """Compares the reward of an answer with the mean of the other answers to the prompt."""

    advantages = staticmethod(leave_one_out_advantages)
