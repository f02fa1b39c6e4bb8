"""Codec: what goes in comes out, to the precision of the encoding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedqlora import protocol_pb2 as pb
from fedqlora.codec import decode, encode
from fedqlora.errors import UpdateError

arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(arrays)
def test_float32_keeps_every_bit(value: np.ndarray) -> None:
    out = decode(encode({"a": value}, "float32"))["a"]
    assert out.shape == value.shape
    assert out.tobytes() == value.tobytes()


@given(arrays)
def test_bfloat16_rounds_to_eight_significant_bits(value: np.ndarray) -> None:
    normal = np.where(np.abs(value) < 1e38, value, 0).astype(np.float32)
    out = decode(encode({"a": normal}, "bfloat16"))["a"]
    # Half a unit of the last of 8 bits; the absolute term covers subnormal numbers.
    assert np.all(np.abs(out - normal) <= np.abs(normal) * 2.0**-8 + 1e-40)


def test_bfloat16_rounds_ties_to_even() -> None:
    # 1 + 2^-8 lies halfway between 1 and 1 + 2^-7; 1 + 3 * 2^-8 between 1 + 2^-7 and 1 + 2^-6.
    value = np.array([1 + 2**-8, 1 + 3 * 2**-8], dtype=np.float32)
    out = decode(encode({"a": value}, "bfloat16"))["a"]
    np.testing.assert_array_equal(out, np.array([1, 1 + 2**-6], dtype=np.float32))


def test_bfloat16_does_not_turn_what_is_not_finite_into_a_number() -> None:
    nan = np.array([0x7FFFFFFF, 0xFFFFFFFF], dtype=np.uint32).view(np.float32)
    value = np.concatenate([nan, np.array([np.inf, -np.inf], dtype=np.float32)])
    out = decode(encode({"a": value}, "bfloat16"))["a"]
    assert np.isnan(out[:2]).all()
    np.testing.assert_array_equal(out[2:], [np.inf, -np.inf])


def test_bfloat16_halves_the_size() -> None:
    adapter = {"a": np.ones((100, 100), dtype=np.float32)}
    sizes = [len(encode(adapter, name).data) for name in ("float32", "bfloat16")]
    assert sizes[0] - sizes[1] == 100 * 100 * 2


def test_what_is_not_the_declared_encoding_is_refused() -> None:
    good = encode({"a": np.ones(2, dtype=np.float32)}, "float32")
    with pytest.raises(UpdateError, match="encoding bfloat16"):
        decode(pb.Tensors(encoding="bfloat16", data=good.data))
    with pytest.raises(UpdateError, match="do not parse"):
        decode(pb.Tensors(encoding="float32", data=good.data[:-3]))
    with pytest.raises(UpdateError, match="unknown"):
        encode({}, "float7")
