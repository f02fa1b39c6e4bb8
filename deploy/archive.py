"""A kit's archive: the same members give the same bytes, and none of them is a private key."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from certs.files import CertificateError

MODIFIED = 946684800
"""Modification time of all members: 1 January 2000; a clock would make each archive another."""

_PRIVATE_NAME = re.compile(r"\.(key|p12|pfx|p8|pk8|jks|ppk)$|(^|/)id_[a-z0-9]+$")
# PEM of any kind; OpenSSH's, raw and as base64; PuTTY, age, and a JSON web key's secret part.
_PRIVATE_TEXT = re.compile(
    rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY|openssh-key-v1\0|b3BlbnNzaC1rZXktdjE|PuTTY-User-Key-File"
    rb'|AGE-SECRET-KEY-1|"kty"[^{}]*"d"\s*:|"d"\s*:[^{}]*"kty"'
)
# DER: version 0 and an algorithm's identifier (PKCS 8), or version 1 and 32 bytes or more (SEC 1),
# or version 0 and a large integer (PKCS 1), at the start of a file.
_PRIVATE_DER = re.compile(
    rb"\x30(?:[\x00-\x7f]|\x81.|\x82..)\x02\x01(?:\x00(?:\x30|\x02\x82)|\x01\x04[\x20\x30\x42])",
    re.DOTALL,
)
# Where an image has its packages: public files, some with published keys for their own tests (seen:
# libgnutls, pycryptodome).
_PACKAGES = re.compile(r"(\./)?(usr|opt/fedqlora/lib)/")
# In an image, code names these markers without a key behind them: there a whole key counts.
_WHOLE_KEY = re.compile(
    rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----\s+(?:[A-Za-z0-9-]+: [^\n]+\n)*[A-Za-z0-9+/=\s]{64,}"
    rb"-----END [A-Z0-9 ]*PRIVATE KEY-----"
)


@dataclass(frozen=True)
class Member:
    """One file of a kit."""

    content: bytes | Path
    """Its bytes, or for an image's archive the file that holds them."""
    executable: bool = False
    """Whether it is a program."""

    def digest(self) -> str:
        """SHA-256, in hex."""
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        return digest_file(self.content).hex()


def digest_file(path: Path) -> bytes:
    """SHA-256 of a file, 32 bytes.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def refuse_private_keys(members: Mapping[str, Member]) -> None:
    """Look through every member, and in every layer of an image through all but its packages.

    Guarantees: no member has the name of a private key, nor holds one as PEM, OpenSSH, PuTTY, age,
    JSON web key or, at its start, DER. A key that is encrypted counts as well. A key that somebody
    hid on purpose, compressed or cut up, is not found: this is against accidents.

    Raises:
        CertificateError: names the first member that is or holds a private key.
    """
    for name, member in members.items():
        if isinstance(member.content, Path):
            found = _find_in_image(member.content)
            where = f"{name}, file {found}," if found else None
        else:
            where = name if _is_private(name, member.content) else None
        if where:
            raise CertificateError(
                f"{where} is or holds a private key: a kit never carries one; take it out and "
                "build the kit again."
            )


def write_archive(path: Path, folder: str, members: Mapping[str, Member]) -> None:
    """Write a gzipped tar whose bytes depend on the members alone.

    Args:
        path: where.
        folder: name of the one folder that all members are in.
        members: by path below the folder.

    Raises:
        OSError: it cannot be written.
    """
    with (
        path.open("wb") as raw,
        # Image layers hardly get smaller with more effort, and the rest is small.
        gzip.GzipFile(
            filename="", mode="wb", compresslevel=1, fileobj=raw, mtime=MODIFIED
        ) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, member in sorted(members.items()):
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.mtime = MODIFIED
            entry.mode = 0o755 if member.executable else 0o644
            if isinstance(member.content, bytes):
                entry.size = len(member.content)
                tar.addfile(entry, io.BytesIO(member.content))
            else:
                entry.size = member.content.stat().st_size
                with member.content.open("rb") as file:
                    tar.addfile(entry, file)


def _is_private(name: str, content: bytes) -> bool:
    """Whether a member's name or content is a private key's."""
    return bool(
        _PRIVATE_NAME.search(name) or _PRIVATE_TEXT.search(content) or _PRIVATE_DER.match(content)
    )


def _find_in_image(path: Path) -> str | None:
    """The first file of an image's layers that holds a whole private key; None if there is none."""
    with tarfile.open(path) as image:
        for layer in image:
            stream = image.extractfile(layer) if layer.isfile() else None
            if stream is None or not _is_tar(stream.read(512)):
                continue
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:*") as files:
                for file in files:
                    content = files.extractfile(file) if file.isfile() else None
                    if content and _holds_key(file.name, content.read()):
                        return file.name
    return None


def _is_tar(start: bytes) -> bool:
    """Whether a file begins as a tar does, or a gzipped one."""
    return start[257:262] == b"ustar" or start[:2] == b"\x1f\x8b"


def _holds_key(name: str, content: bytes) -> bool:
    """Whether a file of an image is a key, or has one inside."""
    if _PACKAGES.match(name):
        return False
    return bool(_PRIVATE_NAME.search(name)) or (
        # Ten times faster than the expression alone, over gigabytes.
        b"PRIVATE KEY-----" in content and bool(_WHOLE_KEY.search(content))
    )
