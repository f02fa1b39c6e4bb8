"""The secure generator: its distribution, and that nothing of it repeats."""

from __future__ import annotations

import numpy as np
import pytest

from fedqlora.privacy.noise import SecureNoise

KEY = bytes(range(32))


def test_normal_values_have_the_normal_distributions_moments_and_quantiles() -> None:
    values = SecureNoise(KEY).normal(200_001).astype(np.float64)
    assert values.size == 200_001
    assert values.mean() == pytest.approx(0, abs=0.01)
    assert values.std() == pytest.approx(1, abs=0.01)
    assert (values**4).mean() == pytest.approx(3, abs=0.1)
    wanted = {0.001: -3.0902, 0.05: -1.6449, 0.5: 0.0, 0.95: 1.6449, 0.999: 3.0902}
    for share, quantile in wanted.items():
        assert np.quantile(values, share) == pytest.approx(quantile, abs=0.06)
    # Box and Muller give pairs: halves that depended on each other would show here.
    half = values.size // 2
    assert np.corrcoef(values[:half], values[half : 2 * half])[0, 1] == pytest.approx(0, abs=0.01)


def test_draws_come_as_often_as_asked() -> None:
    noise = SecureNoise(KEY)
    assert sum(noise.draw(0.3) for _ in range(10_000)) == pytest.approx(3000, abs=200)
    assert not any(noise.draw(0.0) for _ in range(100))
    assert all(noise.draw(1.0) for _ in range(100))


def test_two_generators_share_nothing_and_one_does_not_repeat() -> None:
    one, other = SecureNoise(), SecureNoise()
    first = one.normal(8)
    assert not np.array_equal(first, other.normal(8))
    assert not np.array_equal(first, one.normal(8))
    assert SecureNoise(KEY).normal(0).size == 0
