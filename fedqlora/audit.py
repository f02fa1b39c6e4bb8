"""Audit log: append-only JSON lines, each bound to the one before by its hash.

Guarantees: an edited, removed, inserted or reordered line breaks the chain from there on; a
line is on disk before `append` returns. What the chain alone cannot show is a log cut off
at its end, so the head also leaves the site (with signed replies, in a later version).

Lines hold what was asked, decided and sent (digests, counts, rule names); never a text, a
patient's id, a file's name or a figure about one record.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from fedqlora.errors import AuditError

START = "0" * 64


class AuditLog:
    """An open log; appends continue the chain that the file already holds.

    Args:
        path: the log's file; made if missing.

    Raises:
        AuditError: the chain of the existing file is broken.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._count, self._head = verify(path) if path.exists() else (0, START)

    @property
    def head(self) -> str:
        """Hash of the newest line, as hex."""
        return self._head

    def append(self, event: str, **facts: str | int | float) -> None:
        """Add a line and flush it to disk.

        Raises:
            AuditError: it cannot be written; the caller must not go on.
        """
        body = {"number": self._count + 1, "time": round(time.time(), 3), "event": event, **facts}
        line = _line(body, self._head)
        try:
            with self._path.open("ab") as file:
                size = file.tell()
                try:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self._path, size)
                    raise
        except OSError as error:
            raise AuditError(
                f"audit log {self._path} cannot be written ({error.strerror}); "
                "free space or correct its owner, then start again"
            ) from None
        self._count += 1
        self._head = json.loads(line)["hash"]


def verify(path: Path) -> tuple[int, str]:
    """Check the chain of a log.

    Returns:
        The number of lines and the hash of the last.

    Raises:
        AuditError: names the first line that does not fit.
    """
    head, number = START, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                body = json.loads(line)
                claimed = body.pop("hash")
                good = body["number"] == number and _line(body, head) == line
            except (ValueError, KeyError, TypeError, AttributeError):
                good = False
            if not good:
                raise AuditError(
                    f"audit log {path} does not fit its chain at line {number}; "
                    "keep the file as evidence and restore a good copy"
                )
            head = claimed
    return number, head


def _line(body: dict[str, str | int | float], previous: str) -> bytes:
    """The exact bytes of a line: sorted keys, with the hash over the rest and `previous`."""
    text = json.dumps(body, sort_keys=True)
    digest = hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()
    return json.dumps({**body, "hash": digest}, sort_keys=True).encode() + b"\n"
