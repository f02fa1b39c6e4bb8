"""bfloat16: the upper half of a float32, which numpy has no type for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedqlora.adapter import FloatArray

LARGEST = float.fromhex("0x1.fep127")
"""The largest finite bfloat16."""
_INFINITE = 0x7F80  # all exponent bits: infinity or no number


def to_bfloat16(value: FloatArray) -> NDArray[np.uint16]:
    """The upper 16 bits of each float32, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    # One rounding step may carry into the exponent, as it should; a NaN is kept out of it,
    # since the carry could turn it into a number.
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FC0), rounded)


def from_bfloat16(value: NDArray[np.uint16]) -> FloatArray:
    """Each bfloat16 as the float32 of the same value."""
    return (value.astype(np.uint32) << np.uint32(16)).view(np.float32)


def is_finite(value: NDArray[np.uint16]) -> bool:
    """Whether every bfloat16 is a finite number."""
    return bool(((value & _INFINITE) != _INFINITE).all())
