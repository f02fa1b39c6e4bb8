"""Adapter arithmetic and the refusals of updates that do not fit."""

import numpy as np
import pytest

from fedqlora.adapter import (
    Adapter,
    AdapterSpec,
    add,
    check_residual,
    check_update,
    initial_adapter,
    lower_rank,
    norm,
    subtract,
)
from fedqlora.errors import UpdateError

SPEC = AdapterSpec(shapes=(("m.lora_A.weight", (2, 4)), ("m.lora_B.weight", (3, 2))))


def ones() -> Adapter:
    return {name: np.ones(shape, dtype=np.float32) for name, shape in SPEC.shapes}


def test_the_start_has_a_uniform_a_and_a_zero_b() -> None:
    start = initial_adapter(SPEC, seed=1, given={})
    assert np.abs(start["m.lora_A.weight"]).max() <= 0.5  # 1 / sqrt(4)
    assert np.abs(start["m.lora_A.weight"]).max() > 0.25
    assert not start["m.lora_B.weight"].any()


def test_another_layer_does_not_change_the_start_of_the_others() -> None:
    wider = AdapterSpec(shapes=(("k.lora_A.weight", (2, 4)), *SPEC.shapes))
    first, second = initial_adapter(SPEC, 1, {}), initial_adapter(wider, 1, {})
    np.testing.assert_array_equal(first["m.lora_A.weight"], second["m.lora_A.weight"])
    assert not np.array_equal(second["k.lora_A.weight"], second["m.lora_A.weight"])


def test_another_seed_gives_another_start() -> None:
    assert not np.array_equal(
        initial_adapter(SPEC, 1, {})["m.lora_A.weight"],
        initial_adapter(SPEC, 2, {})["m.lora_A.weight"],
    )


def test_a_tensor_that_is_neither_a_nor_b_needs_a_given_value() -> None:
    spec = AdapterSpec(shapes=(("m.lora_magnitude_vector", (3,)),))
    given = {"m.lora_magnitude_vector": np.array([1, 2, 3], dtype=np.float32)}
    np.testing.assert_array_equal(
        initial_adapter(spec, 1, given)["m.lora_magnitude_vector"], [1, 2, 3]
    )
    with pytest.raises(UpdateError, match="no start value"):
        initial_adapter(spec, 1, {})


def test_subtract_undoes_add() -> None:
    start, delta = initial_adapter(SPEC, 1, {}), ones()
    back = subtract(add(start, delta), start)
    np.testing.assert_allclose(back["m.lora_A.weight"], delta["m.lora_A.weight"], atol=1e-6)


def test_the_norm_is_over_all_tensors() -> None:
    assert norm(ones()) == pytest.approx(np.sqrt(2 * 4 + 3 * 2))


def test_a_fitting_update_passes() -> None:
    check_update(ones(), SPEC, max_norm=4)


def broken(**changes: object) -> Adapter:
    update = ones()
    for name, value in changes.items():
        key = f"m.{name}.weight"
        if value is None:
            del update[key]
        else:
            update[key] = np.asarray(value, dtype=np.float32)
    return update


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (broken(lora_B=None), "lacks tensor"),
        (broken(extra=[1.0]), "unknown tensor"),
        (broken(lora_B=np.ones((2, 3))), "has shape"),
        (broken(lora_B=np.full((3, 2), np.nan)), "not finite"),
        (broken(lora_B=np.full((3, 2), -np.inf)), "not finite"),
        (broken(lora_B=np.full((3, 2), 100.0)), "above aggregation.max_update_norm"),
    ],
)
def test_an_update_that_does_not_fit_is_refused(update: Adapter, reason: str) -> None:
    with pytest.raises(UpdateError, match=reason):
        check_update(update, SPEC, max_norm=10)


def residual(rank: int) -> Adapter:
    spec = SPEC.at_rank(rank)
    return {name: np.ones(shape, dtype=np.float32) for name, shape in spec.shapes}


def test_a_spec_at_another_rank_changes_a_and_b_alone() -> None:
    spec = AdapterSpec(shapes=(*SPEC.shapes, ("m.lora_magnitude_vector", (3,))))
    assert spec.at_rank(5).shapes == (
        ("m.lora_A.weight", (5, 4)),
        ("m.lora_B.weight", (3, 5)),
        ("m.lora_magnitude_vector", (3,)),
    )


def test_an_empty_residual_and_one_up_to_the_cap_pass() -> None:
    check_residual({}, SPEC, 0)
    check_residual(residual(7), SPEC, 7)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (residual(8), "rank 8, more than the 7"),
        ({"m.lora_A.weight": residual(2)["m.lora_A.weight"]}, "lacks tensor m.lora_B"),
        ({"m.lora_B.weight": residual(2)["m.lora_B.weight"]}, "lacks tensor m.lora_A"),
        ({**residual(2), "m.lora_B.weight": residual(3)["m.lora_B.weight"]}, "has shape"),
        ({**residual(2), "other": np.zeros(1, np.float32)}, "unknown tensor other"),
        ({name: value[0] for name, value in residual(2).items()}, "has shape"),
        ({name: value * np.float32(np.nan) for name, value in residual(2).items()}, "not finite"),
    ],
)
def test_a_residual_that_does_not_fit_is_refused(wrong: Adapter, sentence: str) -> None:
    with pytest.raises(UpdateError, match=sentence):
        check_residual(wrong, SPEC, 7)


def test_a_lower_rank_and_its_residual_are_the_same_product() -> None:
    a = np.array([[1, 0, 0, 0], [0, 1, 0, 0]], dtype=np.float32)
    b = np.array([[3, 0], [0, 2], [0, 0]], dtype=np.float32)
    lower, rest = lower_rank({"m.lora_A.weight": a, "m.lora_B.weight": b}, residual(1), 1, 0.5)
    np.testing.assert_array_equal(lower["m.lora_A.weight"], [[1, 0, 0, 0]])
    np.testing.assert_array_equal(lower["m.lora_B.weight"], [[3], [0], [0]])
    # The second direction has strength 0.5 * 2 = 1; the residual that was there is all ones.
    np.testing.assert_array_equal(
        rest["m.lora_B.weight"] @ rest["m.lora_A.weight"],
        [[1, 1, 1, 1], [1, 2, 1, 1], [1, 1, 1, 1]],
    )


def test_the_full_rank_leaves_nothing_to_a_residual() -> None:
    lower, rest = lower_rank(residual(2), {}, 2, 1.0)
    assert rest == {}
    assert all(np.array_equal(value, residual(2)[name]) for name, value in lower.items())
