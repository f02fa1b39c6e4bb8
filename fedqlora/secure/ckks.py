"""CKKS: vectors of integers, encrypted so that they add up to exactly their sum.

Cheon et al. (eprint 2016/421) by TenSEAL, the only import of which is here and happens when it is
needed: it is the optional extra `he`. Additions need no multiplicative level, so the smallest
parameters that hold the values do: polynomials of degree 8192 and two primes of 60 bits, of which
one is for the keys; with 120 bits in all that is above 128 bits of security (at most 218 bits at
this degree, homomorphicencryption.org).

Guarantees, each restated by a test in tests/fedqlora/secure/test_ckks.py:

- What decrypts is the integers' exact sum: the scale leaves the scheme's noise a thousandth of a
  step, and it is rounded off. So no noise of a decryption gets out, from which the secret key
  could be worked out (Li and Micciancio, eprint 2020/1533).
- Who adds has a context without any key and cannot decrypt.

Edge cases: an empty vector is no ciphertext; the last ciphertext is filled up with zeros.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqlora.errors import ConfigError, UpdateError

DEGREE = 8192
SLOTS = DEGREE // 2
"""Values in a ciphertext."""

LIMIT = 2**31
"""All values and all sums are smaller in magnitude."""

_PRIMES = (60, 60)
# Values below 2^31 leave two bits of the 60-bit prime. Noise is about 2^16 for ten ciphertexts.
_SCALE = 2.0**26


@dataclass(frozen=True, kw_only=True)
class KeyPair:
    """Both keys, serialized.

    Attributes:
        secret: what decrypts.
        public: what encrypts.
    """

    secret: bytes = field(repr=False)
    public: bytes = field(repr=False)


def check_installed() -> None:
    """Refuse to start without TenSEAL.

    Raises:
        ConfigError: it cannot be imported here.
    """
    _tenseal()


def make_keys() -> KeyPair:
    """A fresh pair."""
    context = _make_context()
    return KeyPair(
        secret=_serialize(context, secret=True),
        public=_serialize(context, public=True),
    )


def encrypt(public: bytes, values: NDArray[np.int32]) -> list[bytes]:
    """Ciphertexts of `SLOTS` values each.

    Args:
        public: of a key pair.
        values: one dimension, any length.

    Raises:
        UpdateError: `public` is no such key.
    """
    tenseal = _tenseal()
    context = _load(public)
    sealed = []
    for start in range(0, values.size, SLOTS):
        part = np.zeros(SLOTS)
        found = values[start : start + SLOTS]
        part[: found.size] = found
        sealed.append(bytes(tenseal.ckks_vector(context, part.tolist(), _SCALE).serialize()))
    return sealed


def decrypt(secret: bytes, ciphertexts: Sequence[bytes]) -> NDArray[np.int64]:
    """The exact values of ciphertexts or of their sums; a multiple of `SLOTS` of them.

    Raises:
        UpdateError: they are no ciphertexts, or hold what is no sum of integers below `LIMIT`.
    """
    context = _load(secret)
    parts = [_parse(context, one).decrypt() for one in ciphertexts]
    values = np.array(parts, dtype=np.float64).reshape(-1)
    if not (np.abs(values) < LIMIT).all():
        raise UpdateError("a ciphertext does not decrypt to a sum; send the sum of the updates")
    return np.rint(values).astype(np.int64)


class CiphertextSum:
    """Adds up without any key; one sum in memory, whatever the number of sites.

    Args:
        count: of ciphertexts in a vector.
    """

    def __init__(self, count: int) -> None:
        self.context = _keyless_context()
        self._count = count
        self._total: list[Any] = []

    def add(self, site: str, ciphertexts: Sequence[bytes]) -> None:
        """Add a site's ciphertexts.

        Raises:
            UpdateError: there are more or fewer of them, or they are none; nothing was added.
        """
        if len(ciphertexts) != self._count:
            raise UpdateError(
                f"site {site}'s encrypted update has {len(ciphertexts)} ciphertexts, not "
                f"{self._count}; train the adapter that was sent"
            )
        parsed = [_parse(self.context, one) for one in ciphertexts]
        if not self._total:
            self._total = parsed
            return
        for total, one in zip(self._total, parsed, strict=True):
            total.add_(one)

    def ciphertexts(self) -> list[bytes]:
        """The sum so far; empty before the first vector."""
        return [bytes(one.serialize()) for one in self._total]


def _tenseal() -> ModuleType:
    try:
        return importlib.import_module("tenseal")
    except ImportError:
        raise ConfigError(
            "homomorphic_encryption needs TenSEAL, which is not installed here; install fedqlora "
            "with the extra `he` (images: build with EXTRAS=he) or leave the section out"
        ) from None


def _make_context() -> Any:
    tenseal = _tenseal()
    return tenseal.context(
        tenseal.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=list(_PRIMES), n_threads=1
    )


def _serialize(context: Any, *, secret: bool = False, public: bool = False) -> bytes:
    return bytes(
        context.serialize(
            save_public_key=public or secret,
            save_secret_key=secret,
            save_galois_keys=False,
            save_relin_keys=False,
        )
    )


@functools.cache
def _keyless_context() -> Any:
    """The parameters alone. TenSEAL makes none without keys: those are dropped at once."""
    return _load(_serialize(_make_context()))


def _load(context: bytes) -> Any:
    try:
        return _tenseal().context_from(context, n_threads=1)
    except (ValueError, RuntimeError):
        raise UpdateError("bytes that should be a CKKS key are none; send them again") from None


def _parse(context: Any, ciphertext: bytes) -> Any:
    """One ciphertext of ours: a full vector, at our scale and level."""
    try:
        vector = _tenseal().ckks_vector_from(context, ciphertext)
        fits = vector.size() == SLOTS and [one.scale for one in vector.ciphertext()] == [_SCALE]
    except (ValueError, RuntimeError):
        fits = False
    if not fits:
        raise UpdateError("bytes that should be a CKKS ciphertext are none; send them again")
    return vector
