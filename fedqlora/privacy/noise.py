"""SecureNoise: sampling and Gaussian noise from a cryptographically secure generator.

The ChaCha20 keystream under a fresh 256-bit key of the operating system's generator. Who sees
noise of numpy's or torch's generators can work out the rest of it, and subtract it.

Edge cases: probability 0 never draws, 1 always does; zero values is an empty array.
"""

from __future__ import annotations

import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray


class SecureNoise:
    """One keystream; two instances share nothing.

    Args:
        key: 32 bytes; None takes fresh ones. Only a test gives them.
    """

    def __init__(self, key: bytes | None = None) -> None:
        stream = ChaCha20(secrets.token_bytes(32) if key is None else key, bytes(16))
        self._stream = Cipher(stream, mode=None).encryptor()

    def draw(self, probability: float) -> bool:
        """True with this probability, to 53 bits."""
        return bool(self.uniform(1)[0] < probability)

    def normal(self, count: int) -> NDArray[np.float32]:
        """`count` independent standard normal values, by Box and Muller in float64."""
        half = (count + 1) // 2
        # 1 - u lies in (0, 1], where the logarithm is finite.
        radius = np.sqrt(-2 * np.log(1 - self.uniform(half)))
        angle = 2 * np.pi * self.uniform(half)
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return both[:count].astype(np.float32)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Values in [0, 1), multiples of 2**-53."""
        bits = np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")
        values: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return values
