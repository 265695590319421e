"""How little a model may tell of any one window that it read: DP-SGD and its accountant. The only file that needs them.

DP-SGD draws every window into a batch with the same probability, clips its gradient and adds Gaussian noise to the sum
(Abadi et al. 2016). After so many steps the weights are (epsilon, delta)-differentially private: whether any one window
was there or empty changes the probability of any outcome by a factor of at most e^epsilon, but for a probability of
delta. Clipping and noise are those of jax-privacy, epsilon is dp-accounting's. Needs `pip install 'gptjax[private]'`.

What it does not cover: draws and noise follow from the seed of the experiment, so that whoever knows it (it stands in
the run folder and in every checkpoint) knows the noise; losses, the tokenizer and the choice of settings look at the
text as it is; and the weights of `init`, or of a teacher, may have read it before.
"""

import functools
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax import random_streams
from gptjax.config import Experiment
from gptjax.data.batches import PoissonSampler
from gptjax.data.objectives import Batch
from gptjax.errors import GptjaxError


class DPConfig(NamedTuple):
    """How the gradient of a batch is made private."""

    clip_norm: float  # of each window's gradient, at most
    multiplier: float  # standard deviation of the noise on the sum, over clip_norm
    expected: float  # windows in a batch on average, which the sum is divided by
    key: tuple[int, int]  # 64 bits: those of `jax.random.key` are the lower 32 of a seed, which can be guessed


def noise_of(experiment: Experiment, draws: PoissonSampler | None) -> DPConfig | None:
    """What DP-SGD needs to know; None where it is not asked for."""
    o = experiment.optim
    if o.noise_multiplier is None or o.clip_norm is None or draws is None:
        return None
    first, second = np.random.SeedSequence((experiment.seed, random_streams.PRIVACY_NOISE)).generate_state(2).tolist()
    return DPConfig(o.clip_norm, o.noise_multiplier, draws.expected_batch, (first, second))


def check_libraries() -> None:
    """Raises `GptjaxError` where what DP-SGD needs is not installed."""
    _library("jax_privacy")
    _library("dp_accounting")


def private_gradient(
    loss: Callable[[Any, Batch, Array], tuple[Array, Any]], params: Any, batch: Batch, key: Array, noise: DPConfig
) -> tuple[Any, Any]:
    """The sum of what `loss` shows, and the sum of its clipped gradients over `noise.expected`, without the noise.

    `loss` takes params, a [1, length] window and a key of its own; `batch` is [rows, length].
    """
    clipped = _library("jax_privacy").clipped_grad(
        lambda params, row, key: loss(params, jax.tree.map(lambda x: x[None], row), key),
        has_aux=True,
        l2_clip_norm=noise.clip_norm,
        normalize_by=noise.expected,
        keep_batch_dim=False,
        prng_argnum=2,
    )
    grads, of_windows = clipped(params, batch, key)
    return jax.tree.map(lambda x: x.sum(0), of_windows.aux), grads


def add_noise(grads: Any, step: Array | int, noise: DPConfig) -> Any:
    """Gaussian noise on the gradient of the whole batch of a step."""
    addition = _library("jax_privacy").noise_addition
    key = jax.random.fold_in(jax.random.wrap_key_data(jnp.array(noise.key, jnp.uint32)), step)
    gaussian = addition.gaussian_privatizer(stddev=noise.multiplier * noise.clip_norm / noise.expected, prng_key=key)
    return gaussian.update(grads, gaussian.init(grads))[0]


class PrivacySpent(NamedTuple):
    """What is known of epsilon: two upper bounds, both valid."""

    epsilon: float  # from the whole distribution of the privacy loss (Koskela et al. 2020): the tightest that is known
    moments: float  # of the moments accountant (Abadi et al. 2016, theorem 2), which papers reported first


def spent(sampling_rate: float, noise_multiplier: float, steps: int, delta: float) -> PrivacySpent:
    """What `steps` of DP-SGD spend where a batch holds all that is drawn.

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
    events = _library("dp_accounting")
    from dp_accounting import rdp

    one = events.PoissonSampledDpEvent(sampling_rate, events.GaussianDpEvent(noise_multiplier))
    renyi = rdp.RdpAccountant().compose(events.SelfComposedDpEvent(one, steps))
    bounds = [
        divergence + math.log(1 / delta) / (order - 1)
        for order, divergence in zip(renyi.orders, renyi.rdp, strict=True)
    ]
    return PrivacySpent(_epsilon(one, steps, delta), float(min(bounds)))


@functools.cache
def spent_by(draws: PoissonSampler, noise_multiplier: float, steps: int) -> tuple[float, float]:
    """Epsilon of a run and the delta that it holds for, a tenth of one over the windows.

    Batches that could not hold all that was drawn are counted with their own, higher price.
    """
    delta = 0.1 / draws.num_windows
    events = _library("dp_accounting")
    if draws.num_windows <= draws.max_batch:
        one = events.GaussianDpEvent(noise_multiplier)
    else:
        one = events.TruncatedSubsampledGaussianDpEvent(draws.num_windows, draws.sampling_rate, draws.max_batch, noise_multiplier)
    return _epsilon(one, steps, delta, 1e-4 * max(1.0, noise_multiplier**-2)), delta


def _epsilon(one: Any, steps: int, delta: float, interval: float = 1e-4) -> float:
    """An upper bound; losses are rounded up by `interval`, and a coarse one saves time where they are large."""
    from dp_accounting import SelfComposedDpEvent, pld

    accountant = pld.PLDAccountant(value_discretization_interval=interval)
    return float(accountant.compose(SelfComposedDpEvent(one, steps)).get_epsilon(delta))


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise GptjaxError(
            f"differential privacy needs {name.replace('_', '-')}, which is not installed; "
            "pip install 'gptjax[private]'"
        ) from None
