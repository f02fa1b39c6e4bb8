"""FedAvg: the weighted mean, whatever the order of arrival."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqlora.adapter import Adapter
from fedqlora.errors import UpdateError
from server.aggregation.fedavg import FedAvg


def adapter(*values: float) -> Adapter:
    return {"m": np.array(values, dtype=np.float32)}


def test_the_mean_is_weighted_and_added_to_the_start() -> None:
    fold = FedAvg(adapter(1, 1))
    fold.add("a", adapter(4, 0), weight=1)
    fold.add("a", adapter(0, 8), weight=3)
    # 1 + (1*4 + 3*0)/4 and 1 + (1*0 + 3*8)/4
    np.testing.assert_array_equal(fold.finish().adapter["m"], [2, 7])


updates = st.lists(
    st.tuples(
        st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), st.integers(1, 10_000)
    ),
    min_size=1,
    max_size=8,
)


@given(updates, st.randoms())
def test_the_order_of_arrival_cannot_change_a_bit(
    parts: list[tuple[list[float], int]], random: object
) -> None:
    results = []
    for _ in range(2):
        fold = FedAvg(adapter(0, 0, 0))
        for values, weight in parts:
            fold.add("a", adapter(*values), weight)
        results.append(fold.finish().adapter["m"].tobytes())
        random.shuffle(parts)  # type: ignore[attr-defined]
    assert results[0] == results[1]


@given(updates)
def test_the_result_is_the_float64_mean(parts: list[tuple[list[float], int]]) -> None:
    fold = FedAvg(adapter(0, 0, 0))
    for values, weight in parts:
        fold.add("a", adapter(*values), weight)
    values = np.array([v for v, _ in parts], dtype=np.float32).astype(np.float64)
    expected = np.average(values, axis=0, weights=[w for _, w in parts])
    np.testing.assert_allclose(fold.finish().adapter["m"], expected, rtol=1e-6, atol=1e-9)


def test_a_sum_that_would_overflow_is_refused_and_leaves_no_trace() -> None:
    fold = FedAvg(adapter(0))
    fold.add("a", adapter(1), weight=1)
    with pytest.raises(UpdateError, match="out of range"):
        fold.add("a", adapter(1e6), weight=2**20)
    np.testing.assert_array_equal(fold.finish().adapter["m"], [1])


def test_a_weight_of_zero_and_an_empty_round_are_refused() -> None:
    fold = FedAvg(adapter(0))
    with pytest.raises(UpdateError, match="weight 0"):
        fold.add("a", adapter(1), weight=0)
    with pytest.raises(UpdateError, match="no update"):
        fold.finish()
