"""GRPO: group relative policy optimization (Shao et al. 2024), with one update per answer, so nothing is clipped."""

import numpy as np

from gptjax.objectives.on_policy import OnPolicy


def group_advantages(rewards: np.ndarray, log_ratios: np.ndarray, weights: np.ndarray, beta: float) -> np.ndarray:
    """(reward - mean) / deviation of the group, minus the KL penalty's gradient per token; over the answer's length.

    Rewards [prompts, samples], log-ratios and weights [answers, length] -> float32 [answers, length]. The penalty is
    the estimate r - ln r - 1 of KL(model || reference), with r = reference / model at the token.
    """
    deviation = rewards.std(1, ddof=1, keepdims=True)
    relative = ((rewards - rewards.mean(1, keepdims=True)) / (deviation + 1e-4)).reshape(-1, 1)
    lengths = np.maximum(weights.sum(-1, keepdims=True), 1)
    return (weights * (relative - beta * (1 - np.exp(-log_ratios))) / lengths).astype(np.float32)


class GRPO(OnPolicy):
    """Compares the reward of an answer with mean and deviation of its group."""

    advantages = staticmethod(group_advantages)
