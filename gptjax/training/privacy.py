"""How much a model may tell of any one example: the accountant of DP-SGD. The only file that needs dp-accounting.

DP-SGD takes every example into a batch with the same probability, clips its gradient and adds Gaussian noise (Abadi et
al. 2016). After so many steps the weights are (epsilon, delta)-differentially private: whether any one example was
there changes the probability of any outcome by a factor of at most e^epsilon, but for a probability of delta.
Needs `pip install 'gptjax[private]'`.
"""

import math
from typing import NamedTuple

from gptjax.errors import GptjaxError


class Spent(NamedTuple):
    """What is known of epsilon: two upper bounds, both valid."""

    epsilon: float  # from the whole distribution of the privacy loss (Koskela et al. 2020): the tightest that is known
    moments: float  # of the moments accountant (Abadi et al. 2016, theorem 2), which papers reported first


def spent(sampling_rate: float, noise_multiplier: float, steps: int, delta: float) -> Spent:
    """What `steps` of DP-SGD spend.

    `sampling_rate` is the probability of an example to be in a batch, `noise_multiplier` the standard deviation of the
    noise over the norm that gradients are clipped to. Neighbouring data sets differ in one example more or less.
    Raises `GptjaxError` for values out of range, and where the library is missing.
    """
    for name, value, holds, wanted in [
        ("sampling_rate", sampling_rate, 0 < sampling_rate <= 1, "above 0 and at most 1"),
        ("noise_multiplier", noise_multiplier, noise_multiplier > 0, "above 0"),
        ("steps", steps, steps >= 1, "at least 1"),
        ("delta", delta, 0 < delta < 1, "between 0 and 1; less than 1 / examples is usual"),
    ]:
        if not holds:
            raise GptjaxError(f"{name} = {value}: must be {wanted}")
    try:
        import dp_accounting
        from dp_accounting import pld, rdp
    except ImportError:
        raise GptjaxError(
            "differential privacy needs dp-accounting, which is not installed; pip install 'gptjax[private]'"
        ) from None
    one = dp_accounting.PoissonSampledDpEvent(sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    event = dp_accounting.SelfComposedDpEvent(one, steps)
    renyi = rdp.RdpAccountant().compose(event)
    bounds = [
        divergence + math.log(1 / delta) / (order - 1)
        for order, divergence in zip(renyi.orders, renyi.rdp, strict=True)
    ]
    return Spent(float(pld.PLDAccountant().compose(event).get_epsilon(delta)), float(min(bounds)))
