"""Fingerprints: what two people read to each other on the telephone.

24 letters and digits in six groups hold 120 bits of a SHA-256: nobody finds other keys with the
same ones. The base 32 of RFC 4648 has neither 0 nor 1, which look like letters.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

_BYTES = 15
_GROUP = 4
_SIGNING = b"fedqlora signing key v1\n"


def name_bytes(content: bytes) -> str:
    """Return the fingerprint of some bytes, such as `MZXW-6YTB-OI7E-3QKZ-2LPA-7NHD`."""
    text = base64.b32encode(hashlib.sha256(content).digest()[:_BYTES]).decode("ascii")
    return "-".join(text[start : start + _GROUP] for start in range(0, len(text), _GROUP))


def name_signing(key: str) -> str:
    """Return the fingerprint of a signing key, as `peers` in a site's policy pins it.

    Args:
        key: its 32 bytes in hex, as the roster carries it.
    """
    return name_bytes(_SIGNING + bytes.fromhex(key))


def equals(fingerprint: str, typed: str) -> bool:
    """Tell whether what somebody typed is this fingerprint; case, blanks and hyphens are free."""
    plain = "".join(typed.upper().replace("-", " ").split())
    return hmac.compare_digest(fingerprint.replace("-", "").encode(), plain.encode())
