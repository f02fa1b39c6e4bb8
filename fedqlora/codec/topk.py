"""topk: the values of largest magnitude, over all tensors together, and where they are.

Positions are sent as the number of values skipped before each kept one, a byte each; the byte
255 stands for 255 skipped values and no kept one. So positions grow by construction: no bytes
can name one twice or out of order.

Guarantee: what is kept comes back with the error of `bfloat16`, everything else as zero; of
equal magnitudes at the limit, those that come first are kept.
Source: sparsified SGD with memory, arXiv 1809.07599.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedqlora.adapter import FloatArray
from fedqlora.codec.bfloat16 import from_bfloat16, is_finite, to_bfloat16
from fedqlora.codec.blocks import Sizes, cut, take_parts
from fedqlora.errors import UpdateError

_JUMP = 255


def pack(tensors: Sequence[FloatArray], fraction: float) -> dict[str, NDArray[np.generic]]:
    """Skips and values of flat, finite tensors.

    Args:
        tensors: counted through one after the other.
        fraction: share of all values that is kept, at least one; zeros never are.
    """
    values = np.concatenate([np.empty(0, dtype=np.float32), *tensors])
    kept = _choose_largest(np.abs(values), fraction)
    return {"skips": _pack_positions(kept), "values": to_bfloat16(values[kept])}


def unpack(parts: Mapping[str, NDArray[np.generic]], sizes: Sequence[int]) -> list[FloatArray]:
    """The tensors, flat, in the order in which they were packed.

    Args:
        parts: what was received.
        sizes: number of values of each tensor.

    Raises:
        UpdateError: skips and values do not fit each other or the sizes, or a value is not
            finite.
    """
    total = sum(sizes)
    skips = parts.get("skips", np.empty(0, dtype=np.uint8))
    # Before anything is computed from them: each kept value has one byte, each jump 255 values.
    if skips.size > total + total // _JUMP:
        raise UpdateError(
            f"an update in encoding topk has {skips.size} skips for {total} values; send it again"
        )
    kept = int((skips != _JUMP).sum())
    expected: Sizes = {"skips": (np.uint8, skips.size), "values": (np.uint16, kept)}
    take_parts(parts, expected, "topk")
    positions = _unpack_positions(skips.view(np.uint8))
    if (skips.size and skips[-1] == _JUMP) or (kept and positions[-1] >= total):
        raise UpdateError(
            f"an update in encoding topk has a position outside its {total} values; send it again"
        )
    bits = parts["values"].view(np.uint16)
    if not is_finite(bits):
        raise UpdateError(
            "an update in encoding topk has a value that is not finite; send it again"
        )
    values = np.zeros(total, dtype=np.float32)
    values[positions] = from_bfloat16(bits)
    return cut(values, sizes)


def _choose_largest(magnitudes: FloatArray, fraction: float) -> NDArray[np.int64]:
    """Ascending positions of the largest magnitudes."""
    count = min(magnitudes.size, max(1, round(fraction * magnitudes.size)))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    limit = np.partition(magnitudes, magnitudes.size - count)[magnitudes.size - count]
    above = np.flatnonzero(magnitudes > limit)
    if limit == 0:
        return above
    ties = np.flatnonzero(magnitudes == limit)[: count - above.size]
    return np.sort(np.concatenate((above, ties)))


def _pack_positions(positions: NDArray[np.int64]) -> NDArray[np.uint8]:
    """One byte for each position and each jump before it."""
    skips = np.diff(positions, prepend=-1) - 1
    jumps, rest = np.divmod(skips, _JUMP)
    ends = np.cumsum(jumps + 1) - 1
    packed = np.full(int(ends[-1]) + 1 if ends.size else 0, _JUMP, dtype=np.uint8)
    packed[ends] = rest
    return packed


def _unpack_positions(packed: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The reverse; growing, whatever the bytes are."""
    passed: NDArray[np.int64] = np.cumsum(packed, dtype=np.int64)[packed != _JUMP]
    return passed + np.arange(passed.size, dtype=np.int64)
