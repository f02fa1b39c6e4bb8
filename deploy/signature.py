"""The key that signs site kits, and what it signs; checked at a hospital with plain openssl.

    openssl dgst -sha256 -verify kit.pub -signature FILE.sig FILE

The key lies in a folder of its own, `certs/out/kit`, which goes to no host: the coordinator's
folder is mounted where rounds run, and whoever signs kits chooses a hospital's image.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from certs.files import encode_key, read_tls_key, write_folder

KEY_FILE = "kit.key"
PUBLIC_FILE = "kit.pub"


def open_kit_key(out: Path) -> ec.EllipticCurvePrivateKey:
    """The kit key in the folder of all parties, P-256; made at the first call, never replaced.

    Args:
        out: the folder of all parties, such as `certs/out`.

    Raises:
        CertificateError: it cannot be read or written.
    """
    folder = out / "kit"
    if not folder.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        write_folder(folder, {KEY_FILE: encode_key(key), PUBLIC_FILE: encode_kit_public(key)})
    return read_tls_key(folder / KEY_FILE)


def sign_digest(key: ec.EllipticCurvePrivateKey, digest: bytes) -> bytes:
    """ECDSA (DER) over content of which only the SHA-256 is here: it may be larger than memory.

    The same digest has the same signature again (RFC 6979), so a kit can be compared bit by bit.
    """
    algorithm = ec.ECDSA(Prehashed(hashes.SHA256()), deterministic_signing=True)
    return key.sign(digest, algorithm)


def encode_kit_public(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public key as `openssl dgst -verify` reads it (PEM)."""
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def fingerprint_key(key: ec.EllipticCurvePrivateKey) -> str:
    """SHA-256 of the public key (DER), in hex: what both sides compare out of band."""
    info = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(info).hexdigest()
