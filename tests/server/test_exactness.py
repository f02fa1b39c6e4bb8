"""Methods that claim exactness, against the dense weighted mean of the products in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqlora.adapter import Adapter, AdapterSpec, initial_adapter, rank_of
from fedqlora.errors import UpdateError
from fedqlora.halves import Method, select_trained
from server.aggregation.aggregate import Aggregate, Aggregator
from server.aggregation.exact_svd import ExactSvd
from server.aggregation.fedavg import FedAvg
from server.aggregation.fedsvd import FedSvd
from server.aggregation.ffa import Ffa
from server.aggregation.rolora import RoLora

A, B = "m.lora_A.weight", "m.lora_B.weight"
Dense = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """A layer, its sites' ranks and weights, and a seed for all values."""

    d_out: int
    d_in: int
    rank: int
    scale: float
    ranks: tuple[int, ...]
    weights: tuple[int, ...]
    seed: int

    def start(self) -> Adapter:
        spec = AdapterSpec(shapes=((A, (self.rank, self.d_in)), (B, (self.d_out, self.rank))))
        return initial_adapter(spec, self.seed, {})

    def deltas(self, names: tuple[str, ...], round_: int, mixed: bool) -> list[Adapter]:
        generator = np.random.default_rng((self.seed, round_))
        found = []
        for own in self.ranks:
            rank = own if mixed else self.rank
            shapes = {A: (rank, self.d_in), B: (self.d_out, rank)}
            found.append({n: generator.normal(0, 0.3, shapes[n]).astype(np.float32) for n in names})
        return found


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sites = draw(st.integers(1, 5))
    rank = draw(st.integers(1, 4))
    some = {"min_size": sites, "max_size": sites}
    return Case(
        d_out=draw(st.integers(1, 24)),
        d_in=draw(st.integers(1, 24)),
        rank=rank,
        scale=draw(st.sampled_from([0.25, 1.0, 2.0, 16 / 3, 16 / np.sqrt(3)])),
        ranks=tuple(draw(st.lists(st.integers(1, rank), **some))),
        weights=tuple(draw(st.lists(st.integers(1, 10_000), **some))),
        seed=draw(st.integers(0, 2**32)),
    )


def product(scale: float, adapter: Adapter) -> Dense:
    return scale * (adapter[B].astype(np.float64) @ adapter[A].astype(np.float64))


def function(scale: float, state: Aggregate) -> Dense:
    """All that a model computes with: adapter and residual."""
    dense = product(scale, state.adapter)
    return dense + product(1, state.residual) if state.residual else dense


def dense_mean(case: Case, state: Aggregate, deltas: list[Adapter]) -> Dense:
    """What every site's model became, averaged without any factor."""
    sites = []
    for delta in deltas:
        trained = {name: value.astype(np.float64) for name, value in state.adapter.items()}
        for name, value in delta.items():
            trained[name][tuple(slice(size) for size in value.shape)] += value
        part = case.scale * (trained[B] @ trained[A])
        sites.append(part + product(1, state.residual) if state.residual else part)
    return np.average(sites, axis=0, weights=case.weights)


def fold(aggregator: Aggregator, case: Case, deltas: list[Adapter]) -> Aggregate:
    for number, (delta, weight) in enumerate(zip(deltas, case.weights, strict=True)):
        aggregator.add(f"s{number}", delta, weight)
    return aggregator.finish()


def relative_error(found: Dense, expected: Dense) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def start_method(method: Method, case: Case, round_: int, state: Aggregate) -> Aggregator:
    match method:
        case "ffa":
            return Ffa(state.adapter)
        case "fedsvd":
            return FedSvd(state.adapter)
        case "rolora":
            return RoLora(state.adapter, round_)
        case _:
            return ExactSvd(state.adapter, state.residual, scale=case.scale, residual_rank=4096)


@pytest.mark.parametrize(
    ("method", "mixed"),
    [("ffa", False), ("fedsvd", False), ("rolora", False), ("exact_svd", False),
     ("exact_svd", True)],
)  # fmt: skip
@given(cases())
@settings(max_examples=40, deadline=None)
def test_every_round_of_ten_gives_the_dense_mean(method: Method, mixed: bool, case: Case) -> None:
    state = Aggregate(adapter=case.start())
    for round_ in range(1, 11):
        names = select_trained(state.adapter, method, round_)
        deltas = case.deltas(names, round_, mixed)
        expected = dense_mean(case, state, deltas)
        state = fold(start_method(method, case, round_, state), case, deltas)
        assert relative_error(function(case.scale, state), expected) < 1e-5


@given(cases())
@settings(max_examples=40, deadline=None)
def test_ten_uncapped_rounds_do_not_drift_from_a_run_without_factors(case: Case) -> None:
    """The sites' products, not their factors, add up: dense in float64 beside the factored run.

    Rounds may cancel each other, so the drift is measured beside the largest of them so far.
    """
    state = Aggregate(adapter=case.start())
    residual = np.zeros((case.d_out, case.d_in))
    largest = 0.0
    for round_ in range(1, 11):
        deltas = case.deltas((A, B), round_, mixed=True)
        bare = Aggregate(adapter=state.adapter)
        mean = dense_mean(case, bare, deltas) + residual
        state = fold(start_method("exact_svd", case, round_, state), case, deltas)
        residual = mean - product(case.scale, state.adapter)
        largest = max(largest, float(np.linalg.norm(mean)))
        assert np.linalg.norm(function(case.scale, state) - mean) < 1e-5 * largest


def test_fedavg_is_not_the_mean_of_products() -> None:
    """What the exact methods are for: the same check fails for plain averaging."""
    case = Case(8, 8, 2, 1.0, (2, 2), (1, 1), 3)
    state = Aggregate(adapter=case.start())
    deltas = case.deltas((A, B), 1, mixed=False)
    result = fold(FedAvg(state.adapter), case, deltas)
    assert relative_error(product(1, result.adapter), dense_mean(case, state, deltas)) > 0.1


def one_by_one(b: float, a: float) -> Adapter:
    """A layer of one input and one output."""
    return {A: np.array([[a]], dtype=np.float32), B: np.array([[b]], dtype=np.float32)}


def test_two_numbers_worked_by_hand() -> None:
    # From A = 1, B = 0 and scale 2 site x goes to A = 3, B = 1 (product 2*1*3 = 6), site y to
    # A = 1, B = 5 (product 10). x weighs 3 of 4: the mean product is (3*6 + 10)/4 = 7, while
    # fedavg gets A = 2.5, B = 2: 2*2*2.5 = 10.
    updates = {"x": (one_by_one(1, 2), 3), "y": (one_by_one(5, 0), 1)}
    exact = ExactSvd(one_by_one(0, 1), {}, scale=2, residual_rank=4)
    mean = FedAvg(one_by_one(0, 1))
    for site, (delta, weight) in updates.items():
        exact.add(site, delta, weight)
        mean.add(site, delta, weight)
    state = exact.finish()
    assert product(2, state.adapter) == pytest.approx(7)
    assert abs(state.adapter[A].item()) == pytest.approx(1 / np.sqrt(3)), "A's first row norm"
    assert product(2, mean.finish().adapter) == pytest.approx(10)
    assert state.residual == {}


def orthogonal_updates(strengths: list[float]) -> ExactSvd:
    """Sites x, y, z of equal weight whose products are 3, 2, 1 (or so) on the diagonal."""
    start = {A: np.zeros((1, 3), np.float32), B: np.zeros((3, 1), np.float32)}
    exact = ExactSvd(start, {}, scale=1, residual_rank=1)
    for number, strength in enumerate(strengths):
        unit = np.eye(3, dtype=np.float32)[number]
        exact.add("xyz"[number], {A: unit[None], B: (3 * strength * unit)[:, None]}, 1)
    return exact


def test_the_largest_part_trains_the_next_is_kept_and_the_cap_discards_the_rest() -> None:
    state = orthogonal_updates([3, 2, 1]).finish()
    np.testing.assert_allclose(product(1, state.adapter), np.diag([3, 0, 0]), atol=1e-6)
    np.testing.assert_allclose(product(1, state.residual), np.diag([0, 2, 0]), atol=1e-6)
    assert state.figures == pytest.approx({"residual_norm": 2, "discarded_norm": 1})


def test_the_residual_is_carried_over_to_the_next_round() -> None:
    first = orthogonal_updates([3, 2, 0]).finish()
    second = ExactSvd(first.adapter, first.residual, scale=1, residual_rank=1)
    still = {name: np.zeros_like(value) for name, value in first.adapter.items()}
    second.add("x", still, 1)
    np.testing.assert_allclose(function(1, second.finish()), np.diag([3, 2, 0]), atol=1e-6)


def test_without_a_residual_the_discarded_norm_is_all_that_truncation_leaves() -> None:
    start = {A: np.zeros((1, 3), np.float32), B: np.zeros((3, 1), np.float32)}
    exact = ExactSvd(start, {}, scale=1, residual_rank=0)
    for site, size in (("x", 6.0), ("y", 8.0)):
        unit = np.eye(3, dtype=np.float32)[0 if site == "x" else 1]
        exact.add(site, {A: unit[None], B: (size * unit)[:, None]}, 1)
    state = exact.finish()
    assert state.residual == {}
    assert state.figures == pytest.approx({"residual_norm": 0, "discarded_norm": 3})


@given(cases(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_of_arrival_cannot_change_a_bit_of_any_method(case: Case, random: object) -> None:
    methods: tuple[Method, ...] = ("ffa", "fedsvd", "rolora", "exact_svd")
    for method in methods:
        start = Aggregate(adapter=case.start())
        deltas = case.deltas(select_trained(start.adapter, method, 1), 1, mixed=False)
        numbers = list(range(len(deltas)))
        results = []
        for _ in range(2):
            aggregator = start_method(method, case, 1, start)
            for number in numbers:
                aggregator.add(f"s{number}", deltas[number], case.weights[number])
            state = aggregator.finish()
            results.append(
                [v.tobytes() for part in (state.adapter, state.residual) for v in part.values()]
            )
            random.shuffle(numbers)  # type: ignore[attr-defined]
        assert results[0] == results[1]


@given(cases())
@settings(max_examples=40, deadline=None)
def test_rebuilt_factors_can_go_on_learning(case: Case) -> None:
    """Rows of A keep their first norm also where B is zero, so no direction is dead."""
    state = Aggregate(adapter=case.start())
    zero = {name: np.zeros_like(value) for name, value in state.adapter.items()}
    result = fold(start_method("exact_svd", case, 1, state), case, [zero] * len(case.ranks))
    assert not result.adapter[B].any()
    assert result.residual == {}
    live = min(case.rank, case.d_in, case.d_out)
    np.testing.assert_allclose(
        np.linalg.norm(result.adapter[A], axis=1)[:live], 1 / np.sqrt(3), rtol=1e-5
    )


def test_fedsvd_never_leaves_the_first_row_space_of_a_and_its_rows_are_orthonormal() -> None:
    case = Case(6, 8, 3, 2.0, (3, 3), (1, 2), 5)
    state = Aggregate(adapter=case.start())
    first = state.adapter[A].astype(np.float64)
    for round_ in (1, 2):
        deltas = case.deltas((B,), round_, mixed=False)
        state = fold(FedSvd(state.adapter), case, deltas)
    rows = state.adapter[A].astype(np.float64)
    np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=1e-6)
    inside = rows @ np.linalg.pinv(first) @ first
    np.testing.assert_allclose(inside, rows, atol=1e-6)


def test_ffa_and_rolora_leave_the_frozen_half_as_it_was() -> None:
    case = Case(6, 8, 3, 2.0, (3, 3), (1, 2), 5)
    start = case.start()
    for aggregator, half, frozen in (
        (Ffa(start), B, A), (RoLora(start, 1), B, A), (RoLora(start, 2), A, B),
    ):  # fmt: skip
        result = fold(aggregator, case, case.deltas((half,), 1, mixed=False)).adapter
        np.testing.assert_array_equal(result[frozen], start[frozen])
        assert not np.array_equal(result[half], start[half])


def test_the_cap_holds_over_rounds_and_says_what_it_costs() -> None:
    case = Case(24, 24, 2, 1.0, (2,) * 5, (1,) * 5, 7)
    state = Aggregate(adapter=case.start())
    for round_ in range(1, 6):
        deltas = case.deltas((A, B), round_, mixed=False)
        expected = dense_mean(case, state, deltas)
        exact = ExactSvd(state.adapter, state.residual, scale=1, residual_rank=3)
        state = fold(exact, case, deltas)
        assert rank_of(state.residual) == 3
        lost = float(np.linalg.norm(function(1, state) - expected))
        assert state.figures["discarded_norm"] == pytest.approx(lost, rel=1e-4)


def test_a_tensor_that_is_no_matrix_of_a_pair_is_refused() -> None:
    for adapter in (
        {A: np.zeros((2, 4, 3), np.float32), B: np.zeros((4, 2, 1), np.float32)},
        {A: np.zeros((2, 4), np.float32)},
        {"m.lora_magnitude_vector": np.zeros(4, np.float32)},
    ):
        with pytest.raises(UpdateError, match="no SVD"):
            ExactSvd(adapter, {}, scale=1, residual_rank=1)
        with pytest.raises(UpdateError, match="no SVD"):
            FedSvd(adapter)


def test_a_weight_of_zero_an_empty_round_and_a_second_update_are_refused() -> None:
    exact = ExactSvd(one_by_one(0, 1), {}, scale=1, residual_rank=1)
    with pytest.raises(UpdateError, match="site x's update has weight 0"):
        exact.add("x", one_by_one(1, 1), 0)
    with pytest.raises(UpdateError, match="no update"):
        exact.finish()
    exact.add("x", one_by_one(1, 1), 1)
    with pytest.raises(UpdateError, match="second update"):
        exact.add("x", one_by_one(1, 1), 1)
