"""Adapter arithmetic and the refusals of updates that do not fit."""

import numpy as np
import pytest

from fedqlora.adapter import (
    Adapter,
    AdapterSpec,
    add,
    check_update,
    initial_adapter,
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
