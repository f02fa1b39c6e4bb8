"""Control: a site's control variate is what it sent, and a round done again changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.control import Control
from fedqlora.adapter import Adapter, AdapterSpec
from fedqlora.codec import decode, encode
from fedqlora.config import CodecConfig
from fedqlora.errors import UpdateError

FLOAT32, BFLOAT16 = CodecConfig(update="float32"), CodecConfig(update="bfloat16")
SPEC = AdapterSpec(shapes=(("a", (2,)),))


def values(*numbers: float) -> Adapter:
    return {"a": np.array(numbers, dtype=np.float32)}


def send(folder: Path, round_: int, gradient: Adapter, codec: CodecConfig = FLOAT32) -> Adapter:
    """As a trainer that was just started."""
    return decode(Control(folder).encode(gradient, codec, run="r", round_=round_))


def correct(folder: Path, round_: int, everyone: Adapter) -> list[float]:
    sent = encode(everyone, "float32")
    found = Control(folder).correction(sent, SPEC, run="r", round_=round_)
    return [float(value) for value in found["a"]]


def test_changes_add_up_to_the_last_gradient_and_correct_towards_all(tmp_path: Path) -> None:
    assert correct(tmp_path, 1, values(5, 5)) == [5, 5]
    np.testing.assert_array_equal(send(tmp_path, 1, values(1, 2))["a"], [1, 2])
    assert correct(tmp_path, 2, values(5, 5)) == [4, 3]
    np.testing.assert_array_equal(send(tmp_path, 2, values(3, 0))["a"], [2, -2])
    # Round 3 went by without this site.
    assert correct(tmp_path, 4, values(5, 5)) == [2, 5]


def test_it_moves_by_what_was_sent_also_where_that_was_rounded(tmp_path: Path) -> None:
    fine = 1 + 2.0**-12
    sent = send(tmp_path, 1, values(fine, 0), BFLOAT16)["a"][0]
    assert sent == 1
    assert correct(tmp_path, 2, values(fine, 0)) == [2.0**-12, 0]


def test_a_round_done_again_starts_from_the_round_before(tmp_path: Path) -> None:
    send(tmp_path, 1, values(1, 1))
    for _ in range(2):
        np.testing.assert_array_equal(send(tmp_path, 2, values(3, 3))["a"], [2, 2])
    assert correct(tmp_path, 3, values(0, 0)) == [-3, -3]


def test_what_is_sent_has_to_be_of_what_trains(tmp_path: Path) -> None:
    for wrong, said in ((values(1, 2, 3), "has shape"), (values(np.nan, 0), "not finite")):
        with pytest.raises(UpdateError, match=said):
            correct(tmp_path, 1, wrong)
    with pytest.raises(UpdateError, match="lacks tensor a"):
        correct(tmp_path, 1, {})
