"""int8: a block's values in 255 equal steps from minus to plus its largest magnitude.

Guarantee: a value comes back within half a step, 0.51/127 of its block's largest magnitude,
or, in a block with no magnitude above 1.5e-36, as zero.
Source: symmetric absmax quantization as in arXiv 2208.07339, by blocks as in arXiv 2110.02861.
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
from fedqlora.errors import UpdateError

_STEPS = 127


def pack(tensors: Sequence[FloatArray]) -> dict[str, NDArray[np.generic]]:
    """Codes and scales of flat, finite tensors, one after the other."""
    codes = [np.empty(0, dtype=np.int8)]
    scales = [np.empty(0, dtype=np.uint16)]
    for values in tensors:
        scaled, own = scale_blocks(values, _STEPS)
        codes.append(np.rint(scaled).astype(np.int8).reshape(-1)[: values.size])
        scales.append(own)
    return {"codes": np.concatenate(codes), "scales": np.concatenate(scales)}


def unpack(parts: Mapping[str, NDArray[np.generic]], sizes: Sequence[int]) -> list[FloatArray]:
    """The tensors, flat, in the order in which they were packed.

    Args:
        parts: what was received.
        sizes: number of values of each tensor.

    Raises:
        UpdateError: the parts do not fit the sizes, or hold a wrong code or scale.
    """
    blocks = [count_blocks(size) for size in sizes]
    expected: Sizes = {"codes": (np.int8, sum(sizes)), "scales": (np.uint16, sum(blocks))}
    take_parts(parts, expected, "int8")
    codes, scales = parts["codes"].view(np.int8), parts["scales"].view(np.uint16)
    check_scales(scales, _STEPS, "int8")
    if (codes < -_STEPS).any():
        raise UpdateError("an update in encoding int8 has a code of -128; send it again")
    pieces = zip(cut(codes, sizes), cut(scales, blocks), strict=True)
    return [unscale(own.astype(np.float32), scale) for own, scale in pieces]
