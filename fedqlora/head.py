"""Head: number and hash of an audit log's newest line, alone or as a file that its owner signed.

Guarantees, each restated by a test in tests/fedqlora/test_audit.py:

- whoever holds a head can tell whether a log that is shown later still contains it, so a log
  that was cut off or written anew does not pass, however well its own chain fits;
- a signed head was signed by the log's owner: the prefix keeps its signature apart from that of
  envelopes, which the same key signs.

Edge case: an empty log has the number 0 and no hash.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedqlora.errors import AuditError
from fedqlora.files import write_durably

_PREFIX = b"fedqlora audit head\x00"


@dataclass(frozen=True)
class Head:
    """The newest line of a log at some moment."""

    number: int = 0
    """Its number, from 1; 0 before the first line."""
    digest: bytes = b""
    """Its SHA-256, which covers all lines before it; empty before the first line."""


@dataclass(frozen=True, kw_only=True)
class SignedHead:
    """What a head's file holds."""

    head: Head
    """The head."""
    time: float
    """When it was signed, in seconds since 1970."""


def head_path(log: Path) -> Path:
    """The signed head's file: it lies beside the log, `audit.head` beside `audit.jsonl`."""
    return log.with_suffix(".head")


def write_head(path: Path, head: Head, key: Ed25519PrivateKey) -> None:
    """Sign a head with the present time and replace its file.

    Raises:
        AuditError: it cannot be written.
    """
    body = {"number": head.number, "hash": head.digest.hex(), "time": round(time.time(), 3)}
    signature = key.sign(_PREFIX + _canonical(body))
    try:
        write_durably(path, _canonical({**body, "signature": signature.hex()}) + b"\n")
    except OSError as error:
        raise AuditError(
            f"{path} cannot be written ({error.strerror}); free space or correct its owner"
        ) from None


def read_head(path: Path, key: Ed25519PublicKey) -> SignedHead:
    """Read a signed head and check its signature.

    Raises:
        AuditError: it is missing, damaged or not signed by `key`.
    """
    try:
        body = json.loads(path.read_bytes())
        signature = bytes.fromhex(body.pop("signature"))
        key.verify(signature, _PREFIX + _canonical(body))
        return SignedHead(head=Head(body["number"], bytes.fromhex(body["hash"])), time=body["time"])
    except OSError as error:
        raise AuditError(f"{path} cannot be read ({error.strerror}); name another file") from None
    except (ValueError, KeyError, TypeError, AttributeError, InvalidSignature):
        raise AuditError(
            f"{path} is not a head that the log's owner signed with its present key; keep it as "
            "evidence, and compare the log with what the other side recorded"
        ) from None


def head_facts(name: str, head: Head) -> dict[str, int | str]:
    """A head as two facts of an audit line: `<name>_number` and `<name>_hash`."""
    return {f"{name}_number": head.number, f"{name}_hash": head.digest.hex()}


def _canonical(body: dict[str, object]) -> bytes:
    return json.dumps(body, sort_keys=True).encode()
