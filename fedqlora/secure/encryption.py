"""Encryption: how one site's keys reach the others, and how it knows a sum from a single update.

    WRAP    round keys of all sites  ->  the key site: a fresh key, wrapped for each of them
    TRAIN   the wrapped key          ->  each site: ciphertexts, a checksum for the key site
    DECRYPT sum, checksums           ->  the key site: the exact sum, once

Only what encrypts is wrapped. What decrypts stays at the key site, so that no other site's key,
in strange hands, opens an update.

Whoever decrypts has to know what: an aggregator that hands one site's ciphertext over as the sum
would be told that site's update. So each site sends the key site a checksum of its plaintext,
linear and modulo 2^64, whose factors come from a seed that is wrapped with the key. The checksums
of the sites named have to add up to that of what was decrypted.

Guarantees, each restated by a test in tests/fedqlora/secure/test_encryption.py:

- A wrapped key and a checksum open for one site, run and round only, and only if the pinned key
  site, or that pinned site, has sealed them.
- For who does not know the seed, a vector other than the sum passes with a probability of at most
  2^-128: the difference of two sums is below 2^32 and not 0, so that each of the four checksums is
  the same with at most 2^-32.

Not covered: a site that works together with the aggregator knows the seed and can pass anything.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from fedqlora import protocol_pb2 as pb
from fedqlora.errors import EncryptionError
from fedqlora.secure.keys import Group, derive_seal_key

SEED_BYTES = 64
"""Four AES-128 keys, one for the factors of each checksum."""

Checksum = NDArray[np.uint64]

_CHUNK = 2**16
_NONCE_BYTES = 12
_KEY_BYTES = 32


def wrap(
    site: str, private: X25519PrivateKey, group: Group, public: bytes, seed: bytes
) -> pb.WrappedKey:
    """A round's key for all sites of the round.

    Args:
        site: the key site.
        private: its round key.
        group: the round.
        public: what encrypts.
        seed: what checksums are made with (`SEED_BYTES`).
    """
    key = secrets.token_bytes(_KEY_BYTES)
    wrapped = {
        peer: _seal(derive_seal_key(private, site, peer, group, sending=True), key)
        for peer in group.sites
    }
    return pb.WrappedKey(sealed=_seal(key, seed + public), wrapped=wrapped)


def unwrap(
    site: str, private: X25519PrivateKey, group: Group, key_site: str, wrapped: pb.WrappedKey
) -> tuple[bytes, bytes]:
    """What encrypts, and the seed, as `wrap` was given them.

    Raises:
        EncryptionError: it was not wrapped by the key site for this site and round.
    """
    try:
        pair = derive_seal_key(private, site, key_site, group, sending=False)
        opened = _open(_open(pair, wrapped.wrapped[site]), wrapped.sealed)
    except (InvalidTag, KeyError, ValueError):
        raise EncryptionError(
            "homomorphic_encryption.key",
            f"the key of this round was not wrapped by site {key_site[:40]} for site {site}; find "
            "out who changed it",
        ) from None
    return opened[SEED_BYTES:], opened[:SEED_BYTES]


def checksum(values: NDArray[np.integer], seed: bytes) -> Checksum:
    """Four linear checksums modulo 2^64: those of two vectors add up to that of their sum.

    Args:
        values: one dimension; zeros at its end change nothing.
        seed: of the round.
    """
    sums = []
    for number in range(4):
        key = seed[16 * number : 16 * (number + 1)]
        stream = Cipher(AES(key), CTR(bytes(16))).encryptor()
        total = 0
        for start in range(0, values.size, _CHUNK):
            part = values[start : start + _CHUNK].astype(np.int64).view(np.uint64)
            factors = np.frombuffer(stream.update(bytes(part.nbytes)), dtype="<u8")
            total += int((part * factors).sum(dtype=np.uint64))
        sums.append(total % 2**64)
    return np.array(sums, dtype=np.uint64)


def seal_checksum(
    site: str, private: X25519PrivateKey, group: Group, key_site: str, own: Checksum
) -> bytes:
    """A site's checksum, which only the key site can open."""
    key = derive_seal_key(private, site, key_site, group, sending=True)
    return _seal(key, own.astype("<u8").tobytes())


def add_checksums(
    key_site: str,
    private: X25519PrivateKey,
    group: Group,
    alive: Iterable[str],
    sealed: Mapping[str, bytes],
) -> Checksum:
    """The sum of what some sites have sealed for the key site.

    Raises:
        EncryptionError: one of them is missing or was not sealed by that site for this round.
    """
    total = np.zeros(4, dtype=np.uint64)
    for site in alive:
        key = derive_seal_key(private, key_site, site, group, sending=False)
        try:
            total += np.frombuffer(_open(key, sealed.get(site, b"")), dtype="<u8")
        except (InvalidTag, ValueError):
            raise EncryptionError(
                "homomorphic_encryption.sum",
                f"the checksum of site {site} is missing or not its own for this round; send it as "
                "it came",
            ) from None
    return total


def _seal(key: bytes, content: bytes) -> bytes:
    """Under a nonce of its own: a site's key for itself seals two messages."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, content, None)


def _open(key: bytes, sealed: bytes) -> bytes:
    return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], None)
