"""Differential privacy: DP-SGD and its accountant.

DP-SGD draws every window into a batch with the same probability, clips the gradient of each window and adds Gaussian
noise to the sum (Abadi et al. 2016). The weights are then (epsilon, delta)-differentially private: replacing any one
window by an empty one changes the probability of any outcome by a factor of at most e^epsilon, except with probability
delta. Clipping and noise are from jax-privacy, epsilon is from dp-accounting. Needs `pip install 'gptjax[private]'`.

Not covered: draws and noise follow from the seed of the experiment, which is saved in the run folder and in every
checkpoint, so whoever knows the seed knows the noise. Losses, the tokenizer and the choice of settings use the text
without noise. The weights of `init` or of a reference model may have been trained on the text before.
"""

import functools
import importlib
import math
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gptjax import random_streams
from gptjax.config import Experiment
from gptjax.data.batches import Batch
from gptjax.data.poisson import PoissonSampler
from gptjax.errors import GptjaxError
from gptjax.model.gpt import GPT
from gptjax.objectives.losses import Loss, Metrics
from gptjax.training.state import TrainState
from gptjax.training.step import GradFn, MicrobatchGrad, accumulate, loss_sums


class DPConfig(NamedTuple):
    """How the gradient of a batch is made private."""

    clip_norm: float  # largest norm of the gradient of one window
    multiplier: float  # standard deviation of the noise on the sum / clip_norm
    expected: float  # average number of windows in a batch, by which the sum is divided
    key: tuple[int, int]  # 64 bits: `jax.random.key` uses only 32 bits of a seed, which can be guessed


def dp_config(experiment: Experiment, sampler: PoissonSampler | None) -> DPConfig | None:
    """The parameters of DP-SGD; None if the experiment does not use it."""
    o = experiment.optim
    if o.noise_multiplier is None or o.clip_norm is None or sampler is None:
        return None
    first, second = np.random.SeedSequence((experiment.seed, random_streams.PRIVACY_NOISE)).generate_state(2).tolist()
    return DPConfig(o.clip_norm, o.noise_multiplier, sampler.expected_batch, (first, second))


def check_libraries() -> None:
    """Raises `GptjaxError` if a library that DP-SGD needs is not installed."""
    _library("jax_privacy")
    _library("dp_accounting")


def private_gradient(model: GPT, loss: Loss, trainable: Any, config: DPConfig) -> GradFn:
    """The gradient of DP-SGD: the mean loss of each window is differentiated and clipped by itself, and Gaussian noise
    is added to the sum."""
    clipped_sum = accumulate(_clipped_gradient(model, loss, trainable, config), loss)

    def grad_fn(state: TrainState, batch: Batch, reference: Any) -> tuple[Metrics, Any]:
        metrics, grads = clipped_sum(state, batch, reference)
        noisy = add_noise(grads, state.step, config)
        if trainable is None:
            return metrics, noisy
        return metrics, jax.tree.map(lambda x, n, moves: n if moves else x, grads, noisy, trainable)

    return grad_fn


def _clipped_gradient(model: GPT, loss: Loss, trainable: Any, config: DPConfig) -> MicrobatchGrad:
    """The sum of the clipped gradients of a microbatch over `config.expected`, without the noise."""

    def microbatch_grad(
        params: Any, microbatch: Batch, key: Array, reference: Any, normalizer: Array
    ) -> tuple[Metrics, Any]:
        def window_loss(params: Any, row: Batch, key: Array) -> tuple[Array, Metrics]:
            window = jax.tree.map(lambda x: x[None], row)
            total, metrics = loss_sums(params, window, model, loss, key, trainable, reference)
            return total / loss.normalizer(window), jax.tree.map(lambda x: x / normalizer, metrics)

        clipped = _library("jax_privacy").clipped_grad(
            window_loss,
            has_aux=True,
            l2_clip_norm=config.clip_norm,
            normalize_by=config.expected,
            keep_batch_dim=False,
            prng_argnum=2,
        )
        grads, of_windows = clipped(params, microbatch, key)
        return jax.tree.map(lambda x: x.sum(0), of_windows.aux), grads

    return microbatch_grad


def add_noise(grads: Any, step: Array | int, config: DPConfig) -> Any:
    """Gaussian noise on the gradient of the batch of a step."""
    addition = _library("jax_privacy").noise_addition
    key = jax.random.fold_in(jax.random.wrap_key_data(jnp.array(config.key, jnp.uint32)), step)
    gaussian = addition.gaussian_privatizer(stddev=config.multiplier * config.clip_norm / config.expected, prng_key=key)
    return gaussian.update(grads, gaussian.init(grads))[0]


class PrivacySpent(NamedTuple):
    """Two upper bounds of epsilon, both valid."""

    epsilon: float  # from the privacy loss distribution (Koskela et al. 2020): the tightest known
    moments: float  # from the moments accountant (Abadi et al. 2016, theorem 2)


def spent(sampling_rate: float, noise_multiplier: float, steps: int, delta: float) -> PrivacySpent:
    """The privacy that `steps` of DP-SGD spend if batches have no maximum size.

    `sampling_rate` is the probability that an example is in a batch, `noise_multiplier` the standard deviation of the
    noise divided by the clipping norm. Neighbouring data sets differ by adding or removing one example. Raises
    `GptjaxError` for values out of range, and if the library is missing.
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
def spent_by(sampler: PoissonSampler, noise_multiplier: float, steps: int) -> tuple[float, float]:
    """Epsilon of a run, and its delta: 0.1 / number of windows.

    Accounts for batches that were truncated because more windows were drawn than fit.
    """
    delta = 0.1 / sampler.num_windows
    events = _library("dp_accounting")
    if sampler.num_windows <= sampler.max_batch:
        one = events.GaussianDpEvent(noise_multiplier)
    else:
        one = events.TruncatedSubsampledGaussianDpEvent(
            sampler.num_windows, sampler.sampling_rate, sampler.max_batch, noise_multiplier
        )
    return _epsilon(one, steps, delta, 1e-4 * max(1.0, noise_multiplier**-2)), delta


def _epsilon(one: Any, steps: int, delta: float, interval: float = 1e-4) -> float:
    """An upper bound. Losses are rounded up to multiples of `interval`; a coarse one saves time for large losses."""
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
