"""The accountant of DP-SGD against what is known in closed form, and against quadrature in float64."""

import math
import sys

import numpy as np
import pytest

from gptjax.errors import GptjaxError
from gptjax.training.privacy import spent


@pytest.fixture
def library():
    pytest.importorskip("dp_accounting", reason="pip install 'gptjax[private]'")


def phi(x):
    return 0.5 * math.erfc(-x / 2**0.5)


def renyi(order, q, sigma):
    """The divergence of one step by definition: D((1 - q) N(0, s^2) + q N(1, s^2) || N(0, s^2)), by quadrature."""
    z = np.linspace(-12 * sigma, 12 * sigma + order, 400_001)
    log_density = -((z / sigma) ** 2) / 2 - math.log(sigma * math.sqrt(2 * math.pi))
    log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * z - 1) / (2 * sigma**2))
    power = log_density + order * log_ratio
    return (power.max() + math.log(np.trapezoid(np.exp(power - power.max()), z))) / (order - 1)


@pytest.mark.parametrize("q, sigma, steps, delta", [(0.01, 4.0, 10_000, 1e-5), (0.05, 1.1, 300, 1e-6)])
def test_the_moments_are_those_of_the_definition(library, q, sigma, steps, delta):
    orders = [*np.arange(1.5, 12, 0.5), *range(12, 65)]
    bounds = [steps * renyi(order, q, sigma) + math.log(1 / delta) / (order - 1) for order in orders]
    assert spent(q, sigma, steps, delta).moments == pytest.approx(min(bounds), rel=2e-3)


@pytest.mark.parametrize("sigma, steps", [(1.0, 1), (4.0, 10), (20.0, 100)])
def test_epsilon_is_exact_where_all_examples_are_in_every_batch(library, sigma, steps):
    """Then all steps are one Gaussian mechanism with noise sigma / sqrt(steps), of which delta is known.

    Balle & Wang 2018, theorem 8.
    """
    delta, s = 1e-5, sigma / math.sqrt(steps)
    found = spent(1.0, sigma, steps, delta)
    exact = phi(1 / (2 * s) - found.epsilon * s) - math.exp(found.epsilon) * phi(-1 / (2 * s) - found.epsilon * s)
    assert exact == pytest.approx(delta, rel=0.02)
    assert found.moments >= found.epsilon


def test_more_steps_and_less_noise_cost_more(library):
    base = spent(0.02, 2.0, 500, 1e-5)
    for worse in [(0.02, 2.0, 1000, 1e-5), (0.02, 1.5, 500, 1e-5), (0.04, 2.0, 500, 1e-5), (0.02, 2.0, 500, 1e-6)]:
        assert all(np.array(spent(*worse)) > base)


@pytest.mark.parametrize(
    "values, name",
    [((0.0, 1, 1, 0.1), "sampling_rate = 0.0"), ((0.5, 0, 1, 0.1), "noise_multiplier = 0"), ((1, 1, 0, 0.1), "steps"),
     ((1, 1, 1, 1.0), "delta = 1.0")],
)  # fmt: skip
def test_values_out_of_range_are_refused(values, name):
    with pytest.raises(GptjaxError, match=name):
        spent(*values)


def test_without_the_library_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(GptjaxError, match=r"pip install 'gptjax\[private\]'"):
        spent(0.1, 1.0, 10, 1e-5)
