"""What a promise costs and what a history has spent."""

from __future__ import annotations

import logging
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqlora.errors import PrivacyError
from fedqlora.privacy.accountant import (
    LEAST_NOISE,
    Spending,
    calibrate_noise,
    default_delta,
    join,
    spent_epsilon,
    spent_epsilon_rdp,
)

# Most properties are tested on unsampled steps, which cost milliseconds.
DELTA = 1e-3


def steps(count: int, noise: float = 2.0, rate: float = 0.2) -> Spending:
    return Spending(sampling_rate=rate, noise_multiplier=noise, steps=count)


def test_nothing_spent_is_nothing() -> None:
    assert spent_epsilon([], DELTA) == 0


def test_the_published_figure_of_three_epochs_comes_out() -> None:
    # n = 5000, batch 128, delta 1/(n ln n): measured with the library's own, finer grid.
    one = steps(117, noise=1.0, rate=128 / 5000)
    assert spent_epsilon([one], default_delta(5000)) == pytest.approx(1.7755, rel=2e-3)


def test_one_plain_step_never_falls_below_its_closed_form() -> None:
    """The analytic Gaussian mechanism (arXiv 1805.06530), solved for delta at the epsilon found."""
    epsilon = spent_epsilon([steps(1, noise=2.0, rate=1.0)], DELTA)

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    exact = normal(0.25 - 2 * epsilon) - math.exp(epsilon) * normal(-0.25 - 2 * epsilon)
    assert exact <= DELTA
    assert exact == pytest.approx(DELTA, rel=0.01)


@settings(deadline=None, max_examples=8)
@given(count=st.integers(1, 50), noise=st.floats(1.0, 20.0), more=st.floats(1.05, 2.0))
def test_more_steps_and_less_noise_never_cost_less(count: int, noise: float, more: float) -> None:
    one = spent_epsilon([steps(count, noise, 1.0)], DELTA)
    assert spent_epsilon([steps(count + 5, noise, 1.0)], DELTA) >= one
    assert spent_epsilon([steps(count, noise * more, 1.0)], DELTA) <= one
    assert spent_epsilon([steps(count, noise, 1.0)], DELTA / more) >= one


@pytest.mark.parametrize("other", [0.1, 0.4])
def test_a_larger_share_costs_more(other: float) -> None:
    one, two = sorted((0.2, other))
    assert spent_epsilon([steps(4, rate=one)], DELTA) < spent_epsilon([steps(4, rate=two)], DELTA)


@settings(deadline=None, max_examples=8)
@given(parts=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_rounds_cost_together_what_the_joint_run_costs(parts: list[int]) -> None:
    rounds = [steps(count, 3.0, 1.0) for count in parts]
    assert spent_epsilon(rounds, DELTA) == spent_epsilon([steps(sum(parts), 3.0, 1.0)], DELTA)
    assert join(rounds) == (steps(sum(parts), 3.0, 1.0),)


def test_runs_with_different_noise_cost_the_same_in_any_order_and_more_than_each() -> None:
    first, second = steps(3, 2.0, 1.0), steps(5, 4.0, 1.0)
    both = spent_epsilon([first, second], DELTA)
    assert both == spent_epsilon([second, first], DELTA)
    assert both > max(spent_epsilon([first], DELTA), spent_epsilon([second], DELTA))


def test_renyi_accounting_is_looser() -> None:
    one = [steps(20, 2.0)]
    assert spent_epsilon(one, DELTA) < spent_epsilon_rdp(one, DELTA)


@pytest.mark.parametrize("epsilon", [0.5, 4.0])
def test_the_calibrated_noise_keeps_the_promise_and_wastes_little_of_it(epsilon: float) -> None:
    noise = calibrate_noise(epsilon, DELTA, 0.2, 12)
    spent = spent_epsilon([steps(12, noise)], DELTA)
    assert 0.985 * epsilon <= spent <= epsilon
    assert spent_epsilon([steps(12, noise * 0.97)], DELTA) > epsilon


def test_a_generous_promise_still_gets_the_least_noise() -> None:
    assert calibrate_noise(1e4, 0.5, 1.0, 1) == pytest.approx(LEAST_NOISE, rel=0.02)


def test_an_epsilon_that_no_useful_noise_meets_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(PrivacyError, match=r"privacy\.epsilon = 0\.001 cannot be met over 1000"),
    ):
        calibrate_noise(0.001, 1e-6, 0.5, 1000)
