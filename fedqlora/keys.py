"""Signing keys: Ed25519, from PEM files and from the roster's hexadecimal."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from fedqlora.errors import ConfigError


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read an Ed25519 private key (PEM, PKCS #8, no passphrase).

    Raises:
        ConfigError: the file is missing or holds something else.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} holds no readable Ed25519 private key; run `make certs`")
    return key


def public_key(hexadecimal: str) -> Ed25519PublicKey:
    """An Ed25519 public key from its 32 bytes in hexadecimal, as the roster writes it.

    Raises:
        ConfigError: it is not one.
    """
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(hexadecimal.strip()))
    except ValueError:
        raise ConfigError(
            "a public signing key is not 64 hexadecimal digits; run `make verify-certs`"
        ) from None


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Read an Ed25519 public key (PEM).

    Raises:
        ConfigError: the file is missing or holds something else.
    """
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} holds no readable Ed25519 public key; run `make certs`")
    return key
