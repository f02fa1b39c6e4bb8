"""Rules: against Flower's functions and numpy, and against a site that lies."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.server.strategy.aggregate import aggregate_median, aggregate_trimmed_avg
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqlora.adapter import Adapter, AdapterSpec, initial_adapter, lower_rank
from fedqlora.config import RunConfig, validate
from fedqlora.errors import UpdateError
from server.aggregation.collected import Collected, Updates
from server.aggregation.coordinates import take_median, take_trimmed_mean
from server.aggregation.geometric_median import find_shares, weigh_by_distance
from server.aggregation.geometry import (
    factor_gram,
    measure_norms,
    product_gram,
    squared_distances,
)
from server.aggregation.krum import select_by_krum
from server.aggregation.method import start_aggregation
from server.aggregation.norm_clipping import clip, factor_length, product_length
from server.norms import check_norms, running_medians

A, B = "m.lora_A.weight", "m.lora_B.weight"
D_OUT, D_IN, RANK, SCALE = 6, 5, 3, 2.0
SPEC = AdapterSpec(shapes=((A, (RANK, D_IN)), (B, (D_OUT, RANK))))
RULES = ["median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "norm_clipping"]


def pairs(*methods: str) -> list[tuple[str, str]]:
    """Every method with every rule that the configuration lets it have."""
    return [
        (method, rule)
        for method in methods
        for rule in RULES
        if method != "exact_svd" or rule not in ("median", "trimmed_mean")
    ]


def one(*values: float) -> Adapter:
    return {"m": np.array(values, dtype=np.float32)}


def updates_of(*deltas: Adapter, weight: int = 1) -> Updates:
    return {f"s{number}": (delta, weight) for number, delta in enumerate(deltas)}


def start_adapter(seed: int = 1) -> Adapter:
    """As in a later round: B is no longer zero."""
    adapter = initial_adapter(SPEC, seed, {})
    adapter[B] = np.random.default_rng(seed).normal(0, 1, (D_OUT, RANK)).astype(np.float32)
    return adapter


def random_deltas(count: int, seed: int, ranks: tuple[int, ...] = ()) -> list[Adapter]:
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        rank = ranks[number] if ranks else RANK
        shapes = {A: (rank, D_IN), B: (D_OUT, rank)}
        found.append({n: generator.normal(0, 0.5, s).astype(np.float32) for n, s in shapes.items()})
    return found


def dense_change(adapter: Adapter, delta: Adapter) -> NDArray[np.float64]:
    """The change of s B A, in full size and float64."""
    after = {name: value.astype(np.float64) for name, value in adapter.items()}
    for name, value in delta.items():
        after[name][tuple(slice(size) for size in value.shape)] += value
    wide = {name: value.astype(np.float64) for name, value in adapter.items()}
    return SCALE * (after[B] @ after[A] - wide[B] @ wide[A])


def test_the_median_is_taken_value_by_value() -> None:
    found = take_median(updates_of(one(1, 9, 0), one(2, 0, 0), one(99, 1, -5)))
    np.testing.assert_array_equal(found[""][0]["m"], [2, 1, 0])


def test_the_trimmed_mean_leaves_out_each_values_largest_and_smallest() -> None:
    deltas = [one(1, 9), one(2, 0), one(99, 1), one(3, 1), one(4, -7)]
    found = take_trimmed_mean(updates_of(*deltas), 1)
    # (2 + 3 + 4) / 3 and (0 + 1 + 1) / 3
    np.testing.assert_allclose(found[""][0]["m"], [3, 2 / 3], rtol=1e-6)
    with pytest.raises(UpdateError, match="needs 5 updates and has 4"):
        take_trimmed_mean(updates_of(*deltas[:4]), 2)


@given(st.integers(3, 9), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_median_and_trimmed_mean_are_flowers(count: int, seed: int) -> None:
    deltas = random_deltas(count, seed)
    results = [([delta[A], delta[B]], 1) for delta in deltas]
    median = take_median(updates_of(*deltas))[""][0]
    trimmed = take_trimmed_mean(updates_of(*deltas), 1)[""][0]
    for name, value in zip((A, B), aggregate_median(results), strict=True):
        np.testing.assert_array_equal(median[name], value)
    # Half a site more than one, so that Flower's share of n is cut to one.
    expected = aggregate_trimmed_avg(results, 1.5 / count if count > 3 else 0.4)
    for name, value in zip((A, B), expected, strict=True):
        np.testing.assert_allclose(trimmed[name], value, rtol=1e-5, atol=1e-6)


def test_flowers_share_of_a_hundred_sites_leaves_out_one_less_than_it_says() -> None:
    """Why the trimmed mean is ours."""
    values = [([np.array([1e9 if number < 29 else 0.0])], 1) for number in range(100)]
    assert aggregate_trimmed_avg(values, 0.29)[0][0] > 1e6
    deltas = [one(1e9 if number < 29 else 0.0) for number in range(100)]
    assert take_trimmed_mean(updates_of(*deltas), 29)[""][0]["m"][0] == 0


@given(st.integers(5, 9), st.booleans(), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_krum_chooses_whom_flower_chooses(count: int, many: bool, seed: int) -> None:
    deltas = random_deltas(count, seed)
    distances = squared_distances(factor_gram(deltas))
    chosen = select_by_krum(updates_of(*deltas), distances, 1, many=many)
    contents = [
        RecordDict({"arrays": ArrayRecord({n: Array(v.astype(np.float64)) for n, v in d.items()})})
        for d in deltas
    ]
    theirs = select_multikrum(contents, 1, count - 3 if many else 1)
    assert set(chosen) == {f"s{contents.index(content)}" for content in theirs}


def test_krum_by_hand() -> None:
    deltas = [one(0), one(1), one(2), one(3), one(50)]
    distances = squared_distances(factor_gram(deltas))
    # Two nearest each: 1 + 4, 1 + 1, 1 + 1, 1 + 4, far; the first of two equals.
    assert set(select_by_krum(updates_of(*deltas), distances, 1, many=False)) == {"s1"}
    assert set(select_by_krum(updates_of(*deltas), distances, 1, many=True)) == {"s1", "s2"}
    with pytest.raises(UpdateError, match="needs 7 updates and has 5"):
        select_by_krum(updates_of(*deltas), distances, 2, many=False)


def test_the_geometric_median_on_a_line_is_the_median_and_of_a_triangle_its_fermat_point() -> None:
    line = np.array([[0.0], [1.0], [10.0]])
    shares = find_shares(line @ line.T, np.ones(3))
    assert shares @ line == pytest.approx([1.0], abs=1e-3)
    # An equilateral triangle's point of least distances is its centre.
    triangle = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])
    centre = find_shares(triangle @ triangle.T, np.ones(3)) @ triangle
    np.testing.assert_allclose(centre, triangle.mean(axis=0), atol=1e-6)


@given(st.integers(2, 8), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_no_step_away_from_the_geometric_median_shortens_the_way(count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    points = generator.normal(0, 1, (count, 3))
    weights = generator.integers(1, 9, count).astype(np.float64)

    def way(point: NDArray[np.float64]) -> float:
        return float(weights @ np.linalg.norm(points - point, axis=1))

    found = find_shares(points @ points.T, weights) @ points
    for step in generator.normal(0, 0.05, (20, 3)):
        assert way(found) < way(found + step) + 1e-4 * weights.sum()


def test_an_update_far_off_has_no_weight_worth_counting() -> None:
    deltas = [one(1), one(1.1), one(0.9), one(1e7)]
    found = weigh_by_distance(updates_of(*deltas), factor_gram(deltas))
    assert "s3" not in found
    assert sum(weight for _, weight in found.values()) == pytest.approx(2**20, abs=4)


@given(st.lists(st.integers(1, RANK), min_size=1, max_size=5), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_inner_products_of_products_are_those_of_dense_changes_also_of_mixed_ranks(
    ranks: list[int], seed: int
) -> None:
    adapter = start_adapter(seed)
    deltas = random_deltas(len(ranks), seed, tuple(ranks))
    dense = np.stack([dense_change(adapter, delta).ravel() for delta in deltas])
    np.testing.assert_allclose(
        product_gram(adapter, deltas, SCALE), dense @ dense.T, rtol=1e-5, atol=1e-6
    )


def test_the_same_product_of_other_factors_is_far_away_in_factors_only() -> None:
    """(B R, R^-1 A): factors may be anything, so a method of products must not look at them."""
    adapter = start_adapter()
    turn = np.array([[50, 0, 0], [0, 0.02, 1], [0, 0, 1]])
    b = (adapter[B] @ turn).astype(np.float32)
    a = (np.linalg.inv(turn) @ adapter[A]).astype(np.float32)
    delta = {A: a - adapter[A], B: b - adapter[B]}
    norms = measure_norms(adapter, delta, SCALE)
    assert norms["b_norm"] > 20
    assert norms["product_norm"] < 1e-4


def test_norms_are_those_of_the_dense_arrays() -> None:
    adapter, (delta,) = start_adapter(), random_deltas(1, 3)
    norms = measure_norms(adapter, delta, SCALE)
    both = np.concatenate([delta[A].ravel(), delta[B].ravel()])
    assert norms == pytest.approx(
        {
            "a_norm": np.linalg.norm(delta[A]),
            "b_norm": np.linalg.norm(delta[B]),
            "update_norm": np.linalg.norm(both),
            "product_norm": np.linalg.norm(dense_change(adapter, delta)),
        }
    )
    half = measure_norms(adapter, {B: delta[B]}, SCALE)
    assert half.keys() == {"b_norm", "update_norm", "product_norm"}
    assert half["product_norm"] == pytest.approx(
        float(np.linalg.norm(dense_change(adapter, {B: delta[B]})))
    )


@pytest.mark.parametrize("in_products", [False, True])
def test_a_clipped_update_has_the_bounds_length_and_a_short_one_stays(in_products: bool) -> None:
    adapter, (delta,) = start_adapter(), random_deltas(1, 4)
    length = product_length(adapter, SCALE) if in_products else factor_length
    bound = length(delta) / 3
    clipped = clip(delta, length, bound)
    assert length(clipped) == pytest.approx(bound, rel=1e-5)
    ratio = clipped[A] / delta[A]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
    assert clip(delta, length, 2 * length(delta)) is delta


def test_an_update_over_the_ratio_is_refused_and_a_median_of_zero_says_nothing() -> None:
    line = {"event": "site", "outcome": "used", "a_norm": 0.0, "b_norm": 2.0}
    events = [
        line,
        {**line, "b_norm": 4.0},
        {**line, "b_norm": 3.0},
        {**line, "outcome": "invalid", "b_norm": 99.0},
        {"event": "round", "round": 1},
    ]
    medians = running_medians(events)
    assert medians == {"a_norm": 0.0, "b_norm": 3.0}
    check_norms({"a_norm": 5.0, "b_norm": 30.0, "product_norm": 9.0}, medians, 10)
    with pytest.raises(UpdateError, match=r"norm of B is 30.1, over .* = 10 times .* \(3\)"):
        check_norms({"b_norm": 30.1}, medians, 10)


def config_of(method: str, rule: str, sites: int) -> RunConfig:
    values = {
        "model": {"base": "tiny"},
        "lora": {"rank": RANK, "alpha": SCALE * RANK},
        "aggregation": {"method": method, "rule": rule},
        "federation": {"min_sites": sites},
    }
    return validate(RunConfig, values, "test")


def product_after(method: str, rule: str, deltas: list[Adapter]) -> NDArray[np.float64]:
    adapter = start_adapter()
    config = config_of(method, rule, len(deltas))
    aggregator = start_aggregation(config, 1, adapter, {}, {}, {})
    for number, delta in enumerate(deltas):
        part = delta if method != "ffa" else {B: delta[B]}
        aggregator.add(f"s{number}", part, 7)
    result = aggregator.finish()
    dense = SCALE * (result.adapter[B].astype(np.float64) @ result.adapter[A])
    if result.residual:
        dense = dense + result.residual[B].astype(np.float64) @ result.residual[A]
    return dense


@pytest.mark.parametrize(("method", "rule"), pairs("fedavg", "ffa", "exact_svd"))
def test_one_liar_ruins_the_mean_and_no_rule(method: str, rule: str) -> None:
    """Four sites agree up to noise; the fifth sends the opposite, large but well formed."""
    adapter = start_adapter()
    common = random_deltas(1, 9)[0]
    noise = random_deltas(4, 10)
    honest = [{n: common[n] + 0.1 * delta[n] for n in common} for delta in noise]
    liar = {name: -20 * value for name, value in common.items()}
    truth = product_after(method, "mean", honest)
    start = SCALE * (adapter[B].astype(np.float64) @ adapter[A])
    way = np.linalg.norm(truth - start)
    ruined = product_after(method, "mean", [*honest, liar])
    assert np.linalg.norm(ruined - truth) > 3 * way
    kept = product_after(method, rule, [*honest, liar])
    # Clipping bounds the harm to the share of one update, and here that one points backwards.
    assert np.linalg.norm(kept - truth) < (0.6 if rule == "norm_clipping" else 0.35) * way


@pytest.mark.parametrize(("method", "rule"), pairs("fedavg", "fedsvd", "exact_svd"))
@given(st.integers(0, 2**32), st.permutations(range(5)))
@settings(max_examples=5, deadline=None)
def test_the_order_of_arrival_cannot_change_a_bit(
    method: str, rule: str, seed: int, order: list[int]
) -> None:
    names = (B,) if method == "fedsvd" else (A, B)
    deltas = [{n: d[n] for n in names} for d in random_deltas(5, seed)]
    results = []
    for arrival in (range(5), order):
        aggregator = start_aggregation(config_of(method, rule, 5), 1, start_adapter(), {}, {}, {})
        for number in arrival:
            aggregator.add(f"s{number}", deltas[number], 1 + number)
        results.append(aggregator.finish())
    for name, value in results[0].adapter.items():
        assert value.tobytes() == results[1].adapter[name].tobytes()
    assert results[0].set_aside == results[1].set_aside


def test_who_did_not_count_is_named_and_a_second_update_is_refused() -> None:
    aggregator = start_aggregation(config_of("fedavg", "krum", 5), 1, start_adapter(), {}, {}, {})
    for number, delta in enumerate(random_deltas(5, 3)):
        aggregator.add(f"s{number}", delta, 1)
    with pytest.raises(UpdateError, match="second update"):
        aggregator.add("s0", random_deltas(1, 3)[0], 1)
    with pytest.raises(UpdateError, match="weight 0"):
        aggregator.add("s9", random_deltas(1, 3)[0], 0)
    assert len(aggregator.finish().set_aside) == 4


def test_a_lower_rank_counts_as_the_change_that_it_makes() -> None:
    """Krum of products sees through ranks: three sites that did the same, two at a lower rank."""
    adapter = start_adapter()
    lower, _ = lower_rank(adapter, {}, 1, SCALE)
    narrow = {name: 0.3 * value for name, value in lower.items()}
    wide = {name: np.zeros_like(value) for name, value in adapter.items()}
    wide[A][:1], wide[B][:, :1] = narrow[A], narrow[B]
    gram = product_gram(adapter, [narrow, wide], SCALE)
    assert squared_distances(gram)[0, 1] < 1e-9 * gram[0, 0]


def test_clipping_against_earlier_rounds_holds_no_update() -> None:
    config = config_of("fedavg", "norm_clipping", 2)
    aggregator = start_aggregation(config, 2, start_adapter(), {}, {}, {"update_norm": 0.5})
    deltas = random_deltas(2, 5)
    expected = {
        name: start_adapter()[name]
        + sum(0.5 / factor_length(d) * d[name] for d in deltas) / len(deltas)
        for name in (A, B)
    }
    for number, delta in enumerate(deltas):
        aggregator.add(f"s{number}", delta, 3)
        # Gone as soon as it is folded in: its arrays are nobody's.
        delta.clear()
    for name, value in aggregator.finish().adapter.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["fedavg", "exact_svd"])
def test_a_round_without_one_site_is_the_round_that_it_never_took_part_in(method: str) -> None:
    values = {
        "model": {"base": "tiny"},
        "lora": {"rank": RANK},
        "aggregation": {"method": method, "canary": 0.1},
        "evaluation": {"enabled": True},
    }
    config = validate(RunConfig, values, "test")
    whole, others = (start_aggregation(config, 1, start_adapter(), {}, {}, {}) for _ in range(2))
    for number, delta in enumerate(random_deltas(4, 6)):
        whole.add(f"s{number}", delta, 1 + number)
        if number != 2:
            others.add(f"s{number}", delta, 1 + number)
    assert isinstance(whole, Collected)
    without, expected = whole.finish_without("s2"), others.finish()
    assert without.set_aside == ()
    for name, value in expected.adapter.items():
        assert without.adapter[name].tobytes() == value.tobytes()
        assert whole.finish().adapter[name].tobytes() != value.tobytes()
