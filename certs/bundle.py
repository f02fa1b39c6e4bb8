"""Bundles: the few small files that a site and the coordinator send each other as one plain tar.

Guarantee: a bundle that is read has exactly the expected members, each once, each an ordinary
file, and is byte for byte what `encode_bundle` makes of them. So nothing can hide in a header, in
padding or behind the end, and nothing is ever unpacked to a path that the bundle names.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from certs.files import CertificateError

MANIFEST = "manifest.json"
SIGNATURE = "signature"
FORMAT = 1
_BLOCK = tarfile.BLOCKSIZE
_MODE = 0o644


def encode_bundle(files: Mapping[str, bytes]) -> bytes:
    """Return files as a tar, in the order given; equal files make equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), _MODE
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """Return a file's bytes, of which there may not be more than a limit.

    Raises:
        CertificateError: it is missing, no ordinary file or too large.
    """
    try:
        if path.exists() and not path.is_file():
            raise CertificateError(f"{path} is not a file; name the bundle that was sent.")
        with path.open("rb") as file:
            content = file.read(limit_bytes + 1)
    except OSError as error:
        raise CertificateError(
            f"{path} cannot be read ({error.strerror}); name the bundle that was sent."
        ) from error
    if len(content) > limit_bytes:
        raise CertificateError(
            f"{path} is larger than any bundle ({limit_bytes} bytes); refuse it."
        )
    return content


def decode_bundle(content: bytes, names: Sequence[str], where: str) -> dict[str, bytes]:
    """Return the members of a bundle by name.

    Args:
        content: the tar, of a size that was bounded before.
        names: the members that it has to have, in this order.
        where: what to call it in an error.

    Raises:
        CertificateError: it is not exactly that.
    """
    if b"PRIVATE KEY" in content:
        raise CertificateError(
            f"{where} holds a private key, which must never leave its site; delete it there and "
            "here, and make new keys."
        )
    files: dict[str, bytes] = {}
    position = 0
    # Not tarfile's own loop: that follows headers of several formats into one another.
    while content[position : position + _BLOCK].strip(b"\0"):
        try:
            member = tarfile.TarInfo.frombuf(
                content[position : position + _BLOCK], "ascii", "strict"
            )
        except (tarfile.HeaderError, ValueError) as error:
            raise _damaged(where) from error
        if member.type != tarfile.REGTYPE:
            raise CertificateError(
                f"{where} holds {member.name!r}, which is not an ordinary file; ask for a new one."
            )
        if member.name not in names:
            raise CertificateError(
                f"{where} holds {member.name!r}, which does not belong there; ask for a new one."
            )
        if member.name in files:
            raise CertificateError(f"{where} holds {member.name!r} twice; ask for a new one.")
        start, end = position + _BLOCK, position + _BLOCK + member.size
        if not start <= end <= len(content):
            raise _damaged(where)
        files[member.name] = content[start:end]
        position = start + -(-member.size // _BLOCK) * _BLOCK
    missing = [name for name in names if name not in files]
    if missing:
        raise CertificateError(f"{where} lacks {missing[0]}; ask for a new one.")
    if encode_bundle({name: files[name] for name in names}) != content:
        raise _damaged(where)
    return files


def seal(manifest: Mapping[str, object], files: Mapping[str, bytes]) -> bytes:
    """Return the bytes of a manifest that also names the SHA-256 of every file."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return encode_json({"format": FORMAT, **manifest, "files": digests})


def unseal(
    content: bytes, keys: Mapping[str, type], files: Mapping[str, bytes], where: str
) -> dict[str, object]:
    """Return the fields of a manifest after comparing it with the files.

    Args:
        content: the bytes of the manifest.
        keys: the fields that it has to have, and their types.
        files: what it has to name.
        where: what to call the bundle in an error.

    Raises:
        CertificateError: it has other fields, another format, or the files are others.
    """
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(where) from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise CertificateError(
            f"{where} is not a bundle of format {FORMAT}; use the same version on both sides."
        )
    given = {name: value for name, value in fields.items() if name not in ("format", "files")}
    if {name: type(value) for name, value in given.items()} != dict(keys):
        raise _damaged(where)
    if seal(given, files) != content:
        raise CertificateError(
            f"{where} holds other files than its manifest names; ask for a new one."
        )
    return given


def encode_json(content: object) -> bytes:
    """Return JSON whose bytes depend on the content alone."""
    return json.dumps(content, indent=2, sort_keys=True).encode("ascii") + b"\n"


def encode_signature(signature: bytes) -> bytes:
    """Return a signature as a bundle carries it: one line in hex."""
    return signature.hex().encode("ascii") + b"\n"


def decode_signature(content: bytes) -> bytes:
    """Return the signature in a line.

    Raises:
        ValueError: it is written in any other way than `encode_signature` does.
    """
    signature = bytes.fromhex(content.decode("ascii"))
    if encode_signature(signature) != content:
        raise ValueError("not one line in hex")
    return signature


def _damaged(where: str) -> CertificateError:
    return CertificateError(f"{where} is truncated or damaged; have it sent again.")
