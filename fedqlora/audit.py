"""Audit log: append-only JSON lines, each bound to the one before by its hash.

Guarantees: an edited, removed, inserted or reordered line breaks the chain from there on; a
line is on disk before `append` returns. The chain alone cannot show that a log was cut off at its
end or written anew from the start: for that its head is signed beside it, and leaves with every
signed envelope (head.py), so that the other side holds it.

Edge cases: several processes may append to one log, each continues what the others wrote; a
last line without its end, which a power cut leaves, was never acknowledged and is cut off by the
next append.

Lines hold what was asked, decided and sent (digests, counts, rule names); never a text, a
patient's id, a file's name or a figure about one record.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedqlora.errors import AuditError, HistoryError
from fedqlora.head import Head, head_path, read_head, write_head

log = logging.getLogger("fedqlora")

START = "0" * 64
HASH_BYTES = 32


class AuditLog:
    """An open log; appends continue the chain that the file already holds.

    The chain is checked once, when the log is opened; later only what others have appended.

    Args:
        path: the log's file; made if missing.
        key: the owner's signing key, for the head.

    Raises:
        AuditError: the chain is broken, or the log does not contain its own signed head.
    """

    def __init__(self, path: Path, key: Ed25519PrivateKey) -> None:
        self._path = path
        self._key = key
        self._lock = threading.Lock()
        self._hashes = bytearray()
        self._size_bytes = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock, self._opened() as file:
                self._catch_up(file)
        except OSError as error:
            raise _unwritable(path, error) from None
        if head_path(path).exists():
            self.check(read_head(head_path(path), key.public_key()).head, "its signed head")

    @property
    def path(self) -> Path:
        """The log's file."""
        return self._path

    @property
    def head(self) -> Head:
        """The newest line that this process knows of."""
        return Head(len(self._hashes) // HASH_BYTES, bytes(self._hashes[-HASH_BYTES:]))

    def append(self, event: str, **facts: str | int | float) -> None:
        """Add a line and flush it to disk.

        Raises:
            AuditError: it cannot be written, or the file was changed in between; the caller
                must not go on.
        """
        self._append(None, event, facts)

    def append_after(self, last: Head, event: str, **facts: str | int | float) -> None:
        """The same, if no other process has added a line since `last`.

        Raises:
            HistoryError: one has, or the file was changed in between.
            AuditError: it cannot be written.
        """
        self._append(last, event, facts)

    def _append(
        self, last: Head | None, event: str, facts: Mapping[str, str | int | float]
    ) -> None:
        try:
            with self._lock, self._opened() as file:
                self._catch_up(file)
                head = self.head
                if last is not None and head != last:
                    raise HistoryError(f"audit log {self._path} has grown by another process")
                stamp = round(time.time(), 3)
                body = {"number": head.number + 1, "time": stamp, "event": event, **facts}
                line, digest = _line(body, head.digest.hex() or START)
                try:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self._path, self._size_bytes)
                    raise
                self._hashes += bytes.fromhex(digest)
                self._size_bytes += len(line)
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def sign_head(self) -> None:
        """Replace the signed head beside the log by the present one.

        Raises:
            AuditError: it cannot be written.
        """
        with self._lock:
            write_head(head_path(self._path), self.head, self._key)

    def keep_signed(self, stop: threading.Event, pause_seconds: float) -> None:
        """Sign the head anew after every pause, until `stop` is set; a failure is logged."""
        while not stop.wait(pause_seconds):
            try:
                self.sign_head()
            except AuditError as error:
                log.error("%s", error)

    def check(self, head: Head, whose: str) -> None:
        """Refuse a head that this log does not contain.

        Args:
            head: what somebody has seen of this log; number 0 says nothing.
            whose: who says so, for the message.

        Raises:
            HistoryError: the log was cut off or written anew since.
        """
        start = (head.number - 1) * HASH_BYTES
        if head.number and bytes(self._hashes[start : start + HASH_BYTES]) != head.digest:
            raise HistoryError(
                f"the audit log does not contain line {head.number} as {whose} has it: it was cut "
                "off or written anew; keep it as evidence and restore the newest good copy"
            )

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines that were there when the log was opened or have been appended here."""
        with self._path.open("rb") as file:
            for line in file.read(self._size_bytes).splitlines():
                yield json.loads(line)

    def _opened(self) -> IO[bytes]:
        """The file, locked against other processes until it is closed."""
        file = self._path.open("a+b", buffering=0)
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    def _catch_up(self, file: IO[bytes]) -> None:
        """Check and take over what other processes have appended."""
        size = os.fstat(file.fileno()).st_size
        if size < self._size_bytes:
            raise HistoryError(
                f"audit log {self._path} is shorter than it was; keep it as evidence and restore "
                "the newest good copy"
            )
        file.seek(self._size_bytes)
        added = file.read(size - self._size_bytes).splitlines(keepends=True)
        if added and not added[-1].endswith(b"\n"):
            os.truncate(self._path, size - len(added.pop()))
        for digest in follow_chain(added, self.head, self._path):
            self._hashes += digest
        self._size_bytes += sum(len(line) for line in added)


def digest_of(data: bytes) -> str:
    """SHA-256 in hex: how a line names what it does not hold."""
    return hashlib.sha256(data).hexdigest()


def verify(path: Path) -> list[bytes]:
    """Check the chain of a log.

    Returns:
        The hash of every line: what a head of line n has to equal stands at n - 1.

    Raises:
        AuditError: names the first line that does not fit.
    """
    try:
        with path.open("rb") as file:
            return list(follow_chain(file, Head(), path))
    except OSError as error:
        raise AuditError(
            f"audit log {path} cannot be read ({error.strerror}); name a file that is one"
        ) from None


def follow_chain(lines: Iterable[bytes], head: Head, path: Path) -> Iterator[bytes]:
    """The hashes of lines that continue a chain after `head`.

    Raises:
        AuditError: names the first line that does not fit.
    """
    previous = head.digest.hex() or START
    for number, line in enumerate(lines, start=head.number + 1):
        try:
            body = json.loads(line)
            claimed = body.pop("hash")
            good = body["number"] == number and _line(body, previous) == (line, claimed)
        except (ValueError, KeyError, TypeError, AttributeError):
            good = False
        if not good:
            raise AuditError(
                f"audit log {path} does not fit its chain at line {number}; "
                "keep the file as evidence and restore a good copy"
            )
        previous = claimed
        yield bytes.fromhex(claimed)


def _line(body: dict[str, Any], previous: str) -> tuple[bytes, str]:
    """The exact bytes of a line (sorted keys) and its hash, over the rest and `previous`."""
    text = json.dumps(body, sort_keys=True)
    digest = hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()
    return json.dumps({**body, "hash": digest}, sort_keys=True).encode() + b"\n", digest


def _unwritable(path: Path, error: OSError) -> AuditError:
    return AuditError(
        f"audit log {path} cannot be written ({error.strerror}); "
        "free space or correct its owner, then start again"
    )
