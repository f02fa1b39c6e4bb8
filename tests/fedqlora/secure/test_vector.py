"""The vector in the ring: what adds up, to which precision, and what may not go in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqlora.adapter import Adapter, AdapterSpec
from fedqlora.errors import UpdateError
from fedqlora.privacy.noise import SecureNoise
from fedqlora.secure.masks import Ring
from fedqlora.secure.vector import Counts, Scale, pack, unpack, vector_length

SPEC = AdapterSpec(shapes=(("a", (2, 3)), ("b", (4,)), ("empty", (0, 5))))


def draw(count: int) -> np.ndarray:
    return SecureNoise().uniform(count)


def delta_of(values: list[float]) -> Adapter:
    flat = np.array(values, dtype=np.float32)
    return {"a": flat[:6].reshape(2, 3), "b": flat[6:], "empty": np.zeros((0, 5), np.float32)}


def add(vectors: list[Ring]) -> Ring:
    total = np.zeros_like(vectors[0])
    for one in vectors:
        total += one
    return total


value = st.floats(-1, 1, width=32)
site = st.tuples(st.lists(value, min_size=10, max_size=10), st.integers(1, 480))


@settings(max_examples=40, deadline=None)
@given(sites=st.lists(site, min_size=3, max_size=50), spare=st.integers(0, 3))
def test_the_mean_is_the_weighted_mean_to_within_a_step_for_each_site(
    sites: list[tuple[list[float], int]], spare: int
) -> None:
    scale = Scale(sites=len(sites) + spare, most_weight=480, largest=1.0)
    vectors = [pack(delta_of(v), Counts(weight=w), scale, draw) for v, w in sites]
    total = unpack(add(vectors), SPEC, scale, len(sites))
    weights = sum(weight for _, weight in sites)
    exact = sum(np.array(v, np.float32).astype(float) * w for v, w in sites) / weights
    found = np.concatenate([total.mean[name].reshape(-1) for name in ("a", "b")])
    step = scale.most_weight / (weights * scale.steps)
    np.testing.assert_allclose(found, exact, atol=(len(sites) + 1) * step + 1e-7)
    assert {name: value.shape for name, value in total.mean.items()} == dict(SPEC.shapes)


def test_the_largest_values_of_all_sites_at_the_largest_weight_do_not_wrap() -> None:
    for sites in (3, 10, 50):
        for sign in (1.0, -1.0):
            scale = Scale(sites=sites, most_weight=7, largest=0.25)
            vector = pack(delta_of([sign * 0.25] * 10), Counts(weight=7), scale, draw)
            total = unpack(add([vector] * sites), SPEC, scale, sites)
            np.testing.assert_allclose(total.mean["b"], np.full(4, sign * 0.25), rtol=1e-6)


def test_rounding_is_up_or_down_at_random_and_exact_in_the_mean() -> None:
    scale = Scale(sites=3, most_weight=1, largest=2.0**30)
    # A step is about 1.5: 0.5 is a third of one.
    many = np.full(30000, 0.5, dtype=np.float32)
    steps = pack({"m": many}, Counts(), scale, draw)[-many.size :].view(np.int32)
    assert set(steps.tolist()) == {0, 1}
    assert abs(steps.mean() / scale.steps - 0.5) < 0.03


def test_counts_add_up_and_a_figure_is_the_mean_of_those_who_give_it() -> None:
    scale = Scale(sites=3, most_weight=1000, largest=1.0)
    zeros = delta_of([0.0] * 10)
    counts = [
        Counts(weight=10, examples=10, tokens=100, figures={"train_loss": 2.0}),
        Counts(weight=30, examples=30, tokens=50, figures={"train_loss": 1.0, "step_seconds": 9.5}),
        Counts(weight=1),
    ]
    total = unpack(add([pack(zeros, one, scale, draw) for one in counts]), SPEC, scale, 3)
    assert (total.examples, total.tokens) == (40, 150)
    assert total.figures == {"train_loss": 1.5, "step_seconds": 9.5}


def test_a_figure_that_would_wrap_is_cut_at_the_most() -> None:
    scale = Scale(sites=50, most_weight=1, largest=1.0)
    figures = {"train_loss": 1e30, "step_seconds": -5.0}
    vector = pack(delta_of([0.0] * 10), Counts(figures=figures), scale, draw)
    total = unpack(add([vector] * 50), SPEC, scale, 50)
    assert 600 < total.figures["train_loss"] < 700
    assert total.figures["step_seconds"] == 0


@pytest.mark.parametrize(
    ("values", "counts", "reason"),
    [
        ([1.01] * 10, Counts(), "above the run's largest_value = 1"),
        ([0.0] * 10, Counts(weight=0), "weight 0 has no place"),
        ([0.0] * 10, Counts(weight=8), "weight 8 has no place"),
        ([0.0] * 10, Counts(examples=2**31), "too large for a sum of 3 sites"),
    ],
)
def test_what_would_break_the_sum_is_refused_before_it_is_masked(
    values: list[float], counts: Counts, reason: str
) -> None:
    scale = Scale(sites=3, most_weight=7, largest=1.0)
    with pytest.raises(UpdateError, match=reason):
        pack(delta_of(values), counts, scale, draw)


def test_a_sum_that_is_still_masked_makes_no_sense() -> None:
    scale = Scale(sites=3, most_weight=7, largest=1.0)
    noise = np.frombuffer(b"\xa5" * 4 * vector_length(SPEC), dtype=np.uint32)
    with pytest.raises(UpdateError, match="makes no sense"):
        unpack(noise, SPEC, scale, 3)
