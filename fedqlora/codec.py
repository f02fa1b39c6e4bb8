"""Codec: Adapter <-> bytes, in the safetensors format.

Encodings: `float32` keeps every bit; `bfloat16` rounds to the nearest (ties to even) and
halves the size. Deltas may be rounded, an adapter's own values are always sent as float32:
the rounding of a small change is small, that of the weight it changes is not.

Edge cases: no tensors is a valid adapter; a value that is not finite stays so in both
encodings (the receiver refuses it); arrays of size zero keep their shape.
"""

from __future__ import annotations

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, FloatArray
from fedqlora.errors import UpdateError


def encode(adapter: Adapter, encoding: str) -> pb.Tensors:
    """Pack an adapter or a delta.

    Args:
        adapter: float32 arrays by name.
        encoding: `float32` or `bfloat16`.

    Raises:
        UpdateError: the encoding is unknown.
    """
    if encoding == "float32":
        arrays: dict[str, NDArray[np.generic]] = {
            name: np.ascontiguousarray(value) for name, value in adapter.items()
        }
    elif encoding == "bfloat16":
        arrays = {name: _to_bfloat16(value) for name, value in adapter.items()}
    else:
        raise UpdateError(f"encoding {encoding[:40]} is unknown; use float32 or bfloat16")
    return pb.Tensors(encoding=encoding, data=safetensors.numpy.save(arrays))


def decode(tensors: pb.Tensors) -> Adapter:
    """Unpack an adapter or a delta into float32 arrays.

    Raises:
        UpdateError: the bytes are not safetensors of the declared encoding.
    """
    try:
        arrays = safetensors.numpy.load(tensors.data)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError):
        raise UpdateError("tensors do not parse as safetensors; send them again") from None
    wanted = {"float32": np.float32, "bfloat16": np.uint16}.get(tensors.encoding)
    if wanted is None or any(value.dtype != wanted for value in arrays.values()):
        raise UpdateError(f"tensors are not in encoding {tensors.encoding[:40]}; send them again")
    if wanted is np.float32:
        return arrays
    return {name: _from_bfloat16(value) for name, value in arrays.items()}


def _to_bfloat16(value: FloatArray) -> NDArray[np.uint16]:
    """The upper 16 bits of each float32, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    # One rounding step may carry into the exponent, as it should; a NaN is kept out of it,
    # since the carry could turn it into a number.
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FC0), rounded)


def _from_bfloat16(value: NDArray[np.uint16]) -> FloatArray:
    """Each bfloat16 as the float32 of the same value."""
    return (value.astype(np.uint32) << np.uint32(16)).view(np.float32)
