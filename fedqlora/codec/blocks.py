"""Blocks: 64 values of one tensor that share a scale; a tensor's last block may be shorter.

A scale is a bfloat16: it has the range of float32, so that no delta is too small for it, and
its two bytes in 64 values are 3 % of `int8` and 6 % of `nf4`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedqlora.adapter import FloatArray
from fedqlora.codec.bfloat16 import from_bfloat16, is_finite, to_bfloat16
from fedqlora.errors import UpdateError

SIZE = 64
# Below it a bfloat16 has fewer than 8 bits, and a scale could be half of what it stands for.
_SMALLEST_SCALE = float.fromhex("0x1p-126")


_T = TypeVar("_T", bound=np.generic)

Sizes = dict[str, tuple[type[np.generic], int]]
"""Type and number of values of each array of a message."""


def count_blocks(values: int) -> int:
    """Number of blocks of a tensor with so many values."""
    return -(-values // SIZE)


def scale_blocks(values: FloatArray, levels: float) -> tuple[FloatArray, NDArray[np.uint16]]:
    """Divide a tensor's values by their blocks' scales.

    Args:
        values: flat and finite.
        levels: what a block's largest magnitude becomes, up to the rounding of the scale
            (a factor between 1 - 2**-8 and 1 + 2**-8).

    Returns:
        The scaled values, shape (blocks, 64), padded with zeros; and the scales. A block whose
        largest magnitude is below levels * 2**-126 has scale zero and only zeros.
    """
    blocks = np.zeros((count_blocks(values.size), SIZE), dtype=np.float32)
    blocks.reshape(-1)[: values.size] = values
    largest = np.maximum(blocks.max(axis=1), -blocks.min(axis=1))
    scales = to_bfloat16((largest / np.float32(levels)).astype(np.float32))
    divisors = from_bfloat16(scales)
    small = divisors < _SMALLEST_SCALE
    scales[small] = 0
    divisors[small] = np.inf
    return blocks / divisors[:, None], scales


def unscale(values: FloatArray, scales: NDArray[np.uint16]) -> FloatArray:
    """Multiply a tensor's scaled values, flat, by their blocks' scales; the reverse of dividing."""
    factors = np.repeat(from_bfloat16(scales), SIZE)[: values.size]
    return values * factors


def take_parts(
    parts: Mapping[str, NDArray[np.generic]],
    expected: Sizes,
    encoding: str,
) -> None:
    """Refuse a message whose arrays are not exactly those that are expected.

    Args:
        parts: what was received.
        expected: type and number of values of each array.
        encoding: for the message.

    Raises:
        UpdateError: an array is missing, too many, of another type, shape or length.
    """
    found = {name: (part.dtype, part.shape) for name, part in parts.items()}
    wanted = {name: (np.dtype(kind), (size,)) for name, (kind, size) in expected.items()}
    if found != wanted:
        sizes = ", ".join(f"{size} {name}" for name, (_, size) in expected.items())
        raise UpdateError(
            f"an update in encoding {encoding} does not hold {sizes}, as its adapter needs; "
            "bring the site to our release"
        )


def check_scales(scales: NDArray[np.uint16], levels: float, encoding: str) -> None:
    """Refuse scales that are negative or give values that are not finite.

    Args:
        scales: bfloat16 bits.
        levels: the largest magnitude that a scale multiplies.
        encoding: for the message.

    Raises:
        UpdateError: one of them does.
    """
    limit = float(np.finfo(np.float32).max) / levels
    fits = is_finite(scales) and bool((scales < 2**15).all())
    if not fits or float(from_bfloat16(scales).max(initial=0)) > limit:
        raise UpdateError(
            f"an update in encoding {encoding} has a scale that is negative, not finite or too "
            "large; send it again"
        )


def cut(array: NDArray[_T], sizes: Sequence[int]) -> list[NDArray[_T]]:
    """Consecutive pieces of a flat array, of these sizes."""
    ends = itertools.accumulate(sizes)
    return [array[end - size : end] for size, end in zip(sizes, ends, strict=True)]
