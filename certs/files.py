"""Key and certificate files: written whole or not at all, read with one clear error.

A party's folder holds its files in a version, `v1/`, behind a link, `current`: whoever reads
through the link sees one complete version, and a later version replaces it in one step.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

CURRENT = "current"
FIRST_VERSION = "v1"


class CertificateError(Exception):
    """Keys or certificates cannot be made, read or trusted; one sentence for a person."""

    exit_code = 1


class MisuseError(CertificateError):
    """The command asks for something that cannot be; nothing was written."""

    exit_code = 2


def write_folder(folder: Path, files: Mapping[str, bytes], *, versioned: bool = False) -> None:
    """Write a new folder in one step: a reader sees all of its files or no folder.

    Args:
        folder: the folder to make; must not hold anything yet.
        files: contents by file name; names that end in `.key` get mode 0600, others 0644.
        versioned: put the files in `v1/` and link `current` to it.

    Raises:
        CertificateError: the folder cannot be written; nothing is left behind.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # mkdtemp gives mode 0700, which stays: nobody else lists or enters a folder of keys.
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        inside = scratch
        if versioned:
            inside = scratch / FIRST_VERSION
            inside.mkdir(mode=0o700)
            (scratch / CURRENT).symlink_to(FIRST_VERSION)
        for name, content in files.items():
            _write_synced(inside / name, content)
        for written in {inside, scratch}:
            sync_folder(written)
        scratch.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise unwritable(folder, error) from error
    finally:
        # Gone after the rename; otherwise it holds keys that nobody will use.
        shutil.rmtree(scratch, ignore_errors=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write or replace one file in one step, with the mode that its name asks for.

    Raises:
        CertificateError: the file cannot be written; the old one stays as it was.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            _write_synced(Path(scratch) / path.name, content)
            (Path(scratch) / path.name).replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error


def sync_folder(folder: Path) -> None:
    """Make what was renamed inside a folder survive a crash.

    Raises:
        OSError: the disk fails.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        CertificateError: the file is missing or may not be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(
            f"{path} cannot be read ({error.strerror}); restore it or make the keys again."
        ) from error


def read_tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the elliptic-curve private key in a PEM file.

    Raises:
        CertificateError: the file is missing or holds something else.
    """
    key = _read_pem_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _unreadable(path, "an elliptic-curve private key")
    return key


def read_signing_key(path: Path) -> ed25519.Ed25519PrivateKey:
    """Return the Ed25519 private key in a PEM file.

    Raises:
        CertificateError: the file is missing or holds something else.
    """
    key = _read_pem_key(path)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise _unreadable(path, "an Ed25519 private key")
    return key


def is_encrypted(path: Path) -> bool:
    """Tell whether a PEM key file needs a passphrase.

    Raises:
        CertificateError: the file is missing or may not be read.
    """
    return b"BEGIN ENCRYPTED PRIVATE KEY" in read_file(path)


def read_root_key(path: Path, passphrase: bytes | None) -> ec.EllipticCurvePrivateKey:
    """Return the root's private key; a passphrase is not used on a key that has none.

    Raises:
        MisuseError: the passphrase is missing or wrong.
        CertificateError: the file is missing or holds something else.
    """
    if not path.exists():
        raise CertificateError(
            f"{path} is not here: bring the root's key back for this stage; it may leave again "
            "afterwards."
        )
    if not is_encrypted(path):
        return read_tls_key(path)
    if passphrase is None:
        raise MisuseError(f"{path} has a passphrase; name its file with --root-passphrase-file.")
    try:
        key = serialization.load_pem_private_key(read_file(path), passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise MisuseError(
            f"{path} cannot be opened with this passphrase; name the right file with "
            "--root-passphrase-file."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _unreadable(path, "an elliptic-curve private key")
    return key


def _read_pem_key(path: Path) -> object:
    """Whatever private key a PEM file holds."""
    try:
        return serialization.load_pem_private_key(read_file(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _unreadable(path, "an unencrypted PEM private key") from error


def read_supernode_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the SuperNode's private key from a file in OpenSSH format.

    Raises:
        CertificateError: the file is missing or holds something else.
    """
    try:
        key = serialization.load_ssh_private_key(read_file(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _unreadable(path, "an unencrypted OpenSSH private key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _unreadable(path, "an elliptic-curve private key")
    return key


def read_supernode_public(path: Path) -> ec.EllipticCurvePublicKey:
    """Return the SuperNode's public key from a file in OpenSSH format.

    Raises:
        CertificateError: the file is missing or holds something else.
    """
    try:
        key = serialization.load_ssh_public_key(read_file(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _unreadable(path, "an OpenSSH public key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise _unreadable(path, "an elliptic-curve public key")
    return key


def read_public_key(path: Path) -> ed25519.Ed25519PublicKey:
    """Return the Ed25519 public key in a PEM file.

    Raises:
        CertificateError: the file is missing or holds something else.
    """
    try:
        key = serialization.load_pem_public_key(read_file(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _unreadable(path, "a PEM public key") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise _unreadable(path, "an Ed25519 public key")
    return key


def read_certificates(path: Path) -> list[x509.Certificate]:
    """Return the certificates in a PEM file, in file order (a leaf comes first).

    Raises:
        CertificateError: the file is missing or holds no certificate.
    """
    try:
        return x509.load_pem_x509_certificates(read_file(path))
    except ValueError as error:
        raise _unreadable(path, "PEM certificates") from error


def encode_key(
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, passphrase: bytes | None = None
) -> bytes:
    """Return a private key as PEM, PKCS8, encrypted if there is a passphrase."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption()
        if passphrase is None
        else serialization.BestAvailableEncryption(passphrase),
    )


def encode_certificates(*certificates: x509.Certificate) -> bytes:
    """Return certificates as one PEM file, in the order given."""
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)


def encode_public(key: ed25519.Ed25519PublicKey) -> bytes:
    """Return a public signing key as PEM."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _write_synced(path: Path, content: bytes) -> None:
    """Write a new file through to the disk; a key is never readable by others, not briefly."""
    mode = 0o600 if path.suffix == ".key" else 0o644
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        # The umask may have taken bits away from a certificate that others have to read.
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def unwritable(path: Path, error: OSError) -> CertificateError:
    """Return the error for a path that the disk or its modes refuse."""
    return CertificateError(
        f"{path} cannot be written ({error.strerror}); free the path or choose another folder."
    )


def _unreadable(path: Path, expected: str) -> CertificateError:
    return CertificateError(f"{path} does not hold {expected}; restore it or make the keys again.")
