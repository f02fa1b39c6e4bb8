"""nf4: a block's values as 4-bit NormalFloat, two of them a byte, the first in the low bits.

Guarantee: a value comes back within 0.152 of its block's largest magnitude (half of the widest
gap in the table), and zero as zero.
Source: QLoRA, arXiv 2305.14314: 16 quantiles of the normal distribution, zero among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedqlora.adapter import FloatArray
from fedqlora.codec.blocks import (
    Sizes,
    check_scales,
    count_blocks,
    cut,
    scale_blocks,
    take_parts,
    unscale,
)

# Appendix E of the paper.
_TABLE = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=np.float32,
)
_MIDDLES = (_TABLE[1:] + _TABLE[:-1]) / np.float32(2)


def pack(tensors: Sequence[FloatArray]) -> dict[str, NDArray[np.generic]]:
    """Packed codes and scales of flat, finite tensors; each tensor begins with a new byte."""
    packed = [np.empty(0, dtype=np.uint8)]
    scales = [np.empty(0, dtype=np.uint16)]
    for values in tensors:
        scaled, own = scale_blocks(values, 1.0)
        codes = _nearest(scaled).reshape(-1, 2)
        pairs = codes[:, 0] | (codes[:, 1] << np.uint8(4))
        packed.append(pairs[: _count_bytes(values.size)])
        scales.append(own)
    return {"codes": np.concatenate(packed), "scales": np.concatenate(scales)}


def unpack(parts: Mapping[str, NDArray[np.generic]], sizes: Sequence[int]) -> list[FloatArray]:
    """The tensors, flat, in the order in which they were packed.

    Args:
        parts: what was received.
        sizes: number of values of each tensor.

    Raises:
        UpdateError: the parts do not fit the sizes, or hold a wrong scale.
    """
    blocks = [count_blocks(size) for size in sizes]
    lengths = [_count_bytes(size) for size in sizes]
    expected: Sizes = {"codes": (np.uint8, sum(lengths)), "scales": (np.uint16, sum(blocks))}
    take_parts(parts, expected, "nf4")
    packed, scales = parts["codes"].view(np.uint8), parts["scales"].view(np.uint16)
    check_scales(scales, 1.0, "nf4")
    pieces = zip(sizes, cut(packed, lengths), cut(scales, blocks), strict=True)
    tensors = []
    for size, own, scale in pieces:
        codes = np.stack((own & np.uint8(0x0F), own >> np.uint8(4)), axis=1).reshape(-1)[:size]
        tensors.append(unscale(_TABLE[codes], scale))
    return tensors


def _count_bytes(values: int) -> int:
    return -(-values // 2)


def _nearest(scaled: FloatArray) -> NDArray[np.uint8]:
    """The code of the nearest entry: the number of middles between entries below the value."""
    codes = np.zeros(scaled.shape, dtype=np.uint8)
    # Fifteen comparisons of whole arrays take less time than one binary search for each value.
    for middle in _MIDDLES:
        codes += scaled > middle
    return codes
