"""Masks: keystreams that are added to a vector of uint32, which wraps at 2^32.

AES-128 in counter mode under a seed that is used for one mask only, so the counter starts at 0.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

Ring = NDArray[np.uint32]

_CHUNK_BYTES = 2**20
_ZEROS = bytes(_CHUNK_BYTES)


def add_mask(vector: Ring, seed: bytes) -> None:
    """Add the mask of a seed, in place.

    Args:
        vector: one dimension, any length.
        seed: 16 bytes.
    """
    _apply(vector, seed, np.add)


def remove_mask(vector: Ring, seed: bytes) -> None:
    """Subtract the mask of a seed, in place: what `add_mask` with it has added."""
    _apply(vector, seed, np.subtract)


def _apply(vector: Ring, seed: bytes, change: np.ufunc) -> None:
    stream = Cipher(AES(seed), CTR(bytes(16))).encryptor()
    step = _CHUNK_BYTES // vector.itemsize
    for start in range(0, vector.size, step):
        part = vector[start : start + step]
        mask = np.frombuffer(stream.update(_ZEROS[: part.nbytes]), dtype="<u4")
        change(part, mask, out=part)


def to_bytes(vector: Ring) -> bytes:
    """Little-endian, whatever this machine is."""
    return vector.astype("<u4", copy=False).tobytes()


def from_bytes(data: bytes) -> Ring:
    """A vector of its own out of bytes; a rest of fewer than four is left out."""
    values = np.frombuffer(data[: len(data) // 4 * 4], dtype="<u4")
    return values.astype(np.uint32, copy=True)
