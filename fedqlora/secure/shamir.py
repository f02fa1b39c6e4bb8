"""Shamir's secret sharing of 16-byte secrets (CACM 22(11), 1979), over the integers mod 2^130 - 5.

Guarantees: any `threshold` shares give the secret back; fewer are independent of it, since all
coefficients come from the operating system's generator.

Edge cases: a threshold of 1 makes every share the secret itself and is refused, as is one above
the number of shares.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from fedqlora.secure.keys import SEED_BYTES

PRIME = 2**130 - 5
SHARE_BYTES = 17


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares number 1 to `count` of a secret.

    Args:
        secret: 16 bytes.
        threshold: how many shares give it back, from 2 to `count`.
        count: number of shares.

    Raises:
        ValueError: the secret has another size, or the threshold is out of range.
    """
    if len(secret) != SEED_BYTES or not 2 <= threshold <= count:
        raise ValueError(f"cannot split {len(secret)} bytes into {count} by {threshold}")
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))
    shares = []
    for point in range(1, count + 1):
        value = 0
        for coefficient in coefficients:
            value = (value * point + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


class Combiner:
    """Gives secrets back from the shares of one set of numbers, for which it works only once.

    Args:
        numbers: of the shares, different ones from 1, exactly as many as the threshold.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self._weights = {number: _weight(number, numbers) for number in numbers}

    def combine(self, shares: Mapping[int, bytes]) -> bytes:
        """The secret.

        Args:
            shares: one for each of the numbers; others are not looked at.

        Raises:
            ValueError: what they give is no secret, so at least one of them is wrong.
        """
        total = sum(
            weight * int.from_bytes(shares[number], "big")
            for number, weight in self._weights.items()
        )
        # More than 16 bytes: an OverflowError otherwise.
        if (secret := total % PRIME) >= 2 ** (8 * SEED_BYTES):
            raise ValueError("the shares do not belong together")
        return secret.to_bytes(SEED_BYTES, "big")


def _weight(number: int, numbers: Sequence[int]) -> int:
    """Lagrange's weight of one share at zero."""
    above = below = 1
    for other in numbers:
        if other != number:
            above = above * other % PRIME
            below = below * (other - number) % PRIME
    return above * pow(below, -1, PRIME) % PRIME
