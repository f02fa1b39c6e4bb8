"""Encodings of deltas: what comes back, and what a hostile sender cannot make of them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec, check_update
from fedqlora.codec import decode, decode_delta, encode_delta
from fedqlora.codec.bfloat16 import LARGEST
from fedqlora.config import CodecConfig
from fedqlora.errors import UpdateError

WITHOUT_NAMES = ("int8", "nf4", "topk")
SIZES = (0, 1, 63, 64, 65, 130)
EDGES = [0.0, -0.0, 2.0**-149, -(2.0**-133), 2.0**-126, 1.0, -1.0, LARGEST, -LARGEST]

finite = st.floats(width=32, min_value=-(2.0**127), max_value=2.0**127) | st.sampled_from(EDGES)
flat = st.sampled_from(SIZES).flatmap(
    lambda size: hnp.arrays(np.float32, (size,), elements=finite, fill=st.nothing())
)
deltas = st.dictionaries(st.sampled_from(["a", "b", "c"]), flat, max_size=3)
encodings = st.sampled_from(WITHOUT_NAMES)


def codec(update: str, fraction: float = 0.1) -> CodecConfig:
    return CodecConfig(update=update, topk_fraction=fraction)


def round_trip(delta: Adapter, settings: CodecConfig) -> Adapter:
    return decode_delta(encode_delta(delta, settings), AdapterSpec.of(delta))


def largest_in_block(value: np.ndarray) -> np.ndarray:
    """For each value the largest magnitude among its block of 64."""
    starts = range(0, value.size, 64)
    parts = [np.abs(value[i : i + 64].astype(np.float64)) for i in starts]
    return np.concatenate([np.empty(0), *(np.full(part.size, part.max()) for part in parts)])


@settings(deadline=None)
@given(deltas, encodings)
def test_names_shapes_and_type_come_back_and_equal_deltas_give_equal_bytes(
    delta: Adapter, encoding: str
) -> None:
    tensors = encode_delta(delta, codec(encoding))
    back = decode_delta(tensors, AdapterSpec.of(delta))
    assert AdapterSpec.of(back) == AdapterSpec.of(delta)
    assert all(value.dtype == np.float32 for value in back.values())
    again = {name: delta[name].copy() for name in reversed(delta)}
    assert encode_delta(again, codec(encoding)) == tensors
    check_update(back, AdapterSpec.of(delta), max_norm=np.inf)


@pytest.mark.parametrize(("encoding", "bound"), [("int8", 0.51 / 127), ("nf4", 0.1525)])
@settings(deadline=None)
@given(flat)
def test_a_block_is_off_by_no_more_than_its_bound(
    encoding: str, bound: float, value: np.ndarray
) -> None:
    back = round_trip({"a": value}, codec(encoding))["a"].astype(np.float64)
    # Below 127 * 2**-126 a scale has too few bits, and the block is sent as zeros.
    allowed = np.maximum(bound * largest_in_block(value), 1.5e-36)
    assert np.all(np.abs(back - value) <= allowed)


def test_int8_by_hand() -> None:
    # The largest magnitude, 127, makes the step exactly one.
    value = np.array([127, -127, 1, 0.4, -0.6, 0], dtype=np.float32)
    back = round_trip({"a": value}, codec("int8"))["a"]
    np.testing.assert_array_equal(back, [127, -127, 1, 0, -1, 0])


def test_nf4_by_hand() -> None:
    # 0.37 lies between 0.3379 and 0.4407, nearer to the first; blocks do not share a scale.
    value = np.concatenate([np.full(64, 2), [0.37 * 8, 0, -8]]).astype(np.float32)
    back = round_trip({"a": value}, codec("nf4"))["a"]
    np.testing.assert_array_equal(back[:64], np.full(64, 2))
    np.testing.assert_allclose(back[64:], [0.33791524 * 8, 0, -8])


def test_topk_by_hand() -> None:
    first = np.array([0.5, -4, 0.25], dtype=np.float32)
    second = np.array([[2, -2], [2, 1]], dtype=np.float32)
    back = round_trip({"a": first, "b": second}, codec("topk", 3 / 7))
    # Three of seven over both tensors; of the three twos the first two.
    np.testing.assert_array_equal(back["a"], [0, -4, 0])
    np.testing.assert_array_equal(back["b"], [[2, -2], [0, 0]])


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(0, 700), elements=finite, fill=st.just(np.float32(0))),
    st.floats(0.001, 1),
)
def test_topk_keeps_the_largest_and_nothing_else(value: np.ndarray, fraction: float) -> None:
    back = round_trip({"a": value}, codec("topk", fraction))["a"]
    count = max(1, round(fraction * value.size))
    kept = np.flatnonzero(back)
    assert kept.size <= count
    with np.errstate(under="ignore"):
        assert np.all(np.abs(back[kept] - value[kept]) <= np.abs(value[kept]) * 2.0**-8 + 1e-40)
    if kept.size:
        left = np.delete(np.abs(value), kept)
        # A value that bfloat16 rounds to zero was kept and came back as zero.
        assert left.max(initial=0) <= max(np.abs(value[kept]).min(), 1e-40)


def test_positions_far_apart_are_found_again() -> None:
    value = np.zeros(2000, dtype=np.float32)
    value[[0, 255, 256, 511, 1999]] = 1
    np.testing.assert_array_equal(round_trip({"a": value}, codec("topk"))["a"], value)


@pytest.mark.parametrize(
    ("encoding", "least"), [("bfloat16", 1.99), ("int8", 3.87), ("nf4", 7.5), ("topk", 13)]
)
def test_the_ratio_to_float32_counts_every_byte(encoding: str, least: float) -> None:
    generator = np.random.default_rng(1)
    delta = {f"layer.{i}": generator.normal(size=(8, 1600)).astype(np.float32) for i in range(20)}
    sizes = [encode_delta(delta, codec(name)).ByteSize() for name in ("float32", encoding)]
    assert sizes[0] / sizes[1] > least


@pytest.mark.parametrize("encoding", WITHOUT_NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, np.float32(3.4e38)])
def test_what_cannot_be_encoded_is_refused_by_name(encoding: str, bad: float) -> None:
    value = np.array([1, bad], dtype=np.float32)
    with pytest.raises(UpdateError, match="tensor lora_A holds a value that is not finite"):
        encode_delta({"lora_A": value}, codec(encoding))


def test_an_adapter_is_never_taken_in_an_encoding_of_deltas() -> None:
    tensors = encode_delta({"a": np.ones(64, dtype=np.float32)}, codec("nf4"))
    with pytest.raises(UpdateError, match="not in encoding nf4"):
        decode(tensors)


def test_values_of_another_adapter_with_as_many_values_are_refused() -> None:
    value = np.arange(64, dtype=np.float32)
    tensors = encode_delta({"a": value.reshape(8, 8)}, codec("int8"))
    with pytest.raises(UpdateError, match="not of the adapter that was sent"):
        decode_delta(tensors, AdapterSpec.of({"a": value.reshape(4, 16)}))


VALUE = np.linspace(-1, 1, 130, dtype=np.float32)
SPEC = AdapterSpec.of({"a": VALUE})
NAN, INFINITE, MINUS = 0x7FC0, 0x7F80, 0xBF80


def forge(encoding: str, **changes: np.ndarray | None) -> pb.Tensors:
    """A well-formed update with some of its arrays replaced or (None) removed."""
    parts = safetensors.numpy.load(encode_delta({"a": VALUE}, codec(encoding)).data)
    merged = {**parts, **changes}
    kept = {name: part for name, part in merged.items() if part is not None}
    return pb.Tensors(encoding=encoding, data=safetensors.numpy.save(kept))


def u8(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint8)


def u16(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint16)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (forge("int8", scales=u16(0, 0)), "does not hold 130 codes, 3 scales"),
        (forge("int8", scales=u16(0, 0, 0, 0)), "does not hold 130 codes, 3 scales"),
        (forge("int8", codes=np.zeros(129, dtype=np.int8)), "does not hold 130 codes"),
        (forge("int8", codes=np.zeros(130, dtype=np.uint8)), "does not hold 130 codes"),
        (forge("int8", codes=np.zeros((65, 2), dtype=np.int8)), "does not hold 130 codes"),
        (forge("int8", codes=None), "does not hold 130 codes"),
        (forge("int8", more=u8(1)), "does not hold 130 codes"),
        (forge("int8", codes=np.full(130, -128, dtype=np.int8)), "a code of -128"),
        (forge("int8", scales=u16(0, NAN, 0)), "a scale that is negative, not finite"),
        (forge("int8", scales=u16(INFINITE, 0, 0)), "a scale that is negative, not finite"),
        (forge("int8", scales=u16(0, 0, MINUS)), "a scale that is negative, not finite"),
        # Finite, but 127 of it is not.
        (forge("int8", scales=u16(0x7F7F, 0, 0)), "or too large"),
        (forge("nf4", codes=np.zeros(66, dtype=np.uint8)), "does not hold 65 codes, 3 scales"),
        (forge("nf4", scales=u16(0, 0)), "does not hold 65 codes, 3 scales"),
        (forge("nf4", scales=u16(0, 0, NAN)), "a scale that is negative, not finite"),
        (forge("topk", skips=u8(130), values=u16(0x3F80)), "a position outside its 130"),
        (forge("topk", skips=u8(100, 29), values=u16(1, 1)), "a position outside its 130"),
        (forge("topk", skips=u8(1, 255), values=u16(0x3F80)), "a position outside its 130"),
        (forge("topk", skips=np.zeros(131, dtype=np.uint8)), "131 skips for 130 values"),
        (forge("topk", skips=u8(1, 1), values=u16(1)), "does not hold 2 skips, 2 values"),
        (forge("topk", skips=u8(1), values=u16(1, 1)), "does not hold 1 skips, 1 values"),
        (forge("topk", skips=None), "does not hold 0 skips, 0 values"),
        (forge("topk", skips=u8(1), values=u16(NAN)), "a value that is not finite"),
        (forge("topk", spec=u8(*range(32))), "not of the adapter that was sent"),
        (forge("nf4", spec=None), "not of the adapter that was sent"),
        (pb.Tensors(encoding="nf4", data=b"\xff" * 40), "do not parse"),
    ],
)
def test_hostile_bytes_are_one_sentence(tensors: pb.Tensors, sentence: str) -> None:
    with pytest.raises(UpdateError, match=re.escape(sentence)) as caught:
        decode_delta(tensors, SPEC)
    assert "\n" not in str(caught.value)
    # It is the spoiled array that is refused: the honest one passes.
    check_update(decode_delta(forge(tensors.encoding), SPEC), SPEC, max_norm=100)


@settings(deadline=None)
@given(encodings, st.data())
def test_any_change_of_bytes_is_refused_or_gives_a_finite_update(
    encoding: str, data: st.DataObject
) -> None:
    honest = encode_delta({"a": VALUE}, codec(encoding)).data
    at = data.draw(st.integers(0, len(honest) - 1))
    byte = data.draw(st.integers(0, 255))
    forged = honest[:at] + bytes([byte]) + honest[at + 1 :]
    try:
        back = decode_delta(pb.Tensors(encoding=encoding, data=forged), SPEC)
    except UpdateError:
        return
    check_update(back, SPEC, max_norm=np.inf)


def test_a_short_message_cannot_claim_a_large_update() -> None:
    # One kept value at the far end of what its own header says: only the spec sets the size.
    tensors = forge("topk", skips=u8(*[255] * 120, 0), values=u16(0x3F80))
    with pytest.raises(UpdateError, match="a position outside its 130 values"):
        decode_delta(tensors, SPEC)
    wide = AdapterSpec(shapes=(("a", (40_000,)),))
    with pytest.raises(UpdateError, match="not of the adapter that was sent"):
        decode_delta(tensors, wide)
