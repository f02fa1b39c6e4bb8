"""The coordinator's reply to a site that keeps its own keys, always up to date.

A reply is a bundle of `manifest.json` (format, site, the request that it answers, a number, SHA-256
of the other files), `client.crt`, `ca.crt`, `coordinator.pub`, the signed roster, and the manifest
signed with the coordinator's key. There is nothing secret in it. `replies/<site>.reply.tar` follows
from the other folders alone and is written again at the end of every change: what is sent to a
site after a rollover's stage, or after another site was admitted, is the same file again.

The number is the revocation list's, which grows with every change: a site takes no older reply.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519

from certs.bundle import (
    MANIFEST,
    SIGNATURE,
    decode_bundle,
    decode_signature,
    encode_bundle,
    encode_signature,
    seal,
    unseal,
)
from certs.change import REPLIES, Record, changing
from certs.crl import CRL_FILE, read_lists, read_number
from certs.files import (
    CURRENT,
    CertificateError,
    encode_public,
    read_certificates,
    read_file,
    read_signing_key,
    replace_file,
    unwritable,
)
from certs.parties import REQUEST_FILE, list_enrolled
from certs.request import decode_request
from certs.roster import ROSTER_FILE, SIGNATURE_FILE

CONTEXT = b"fedqlora enrolment reply v1\n"
LIMIT_BYTES = 4194304
_FILES = ("client.crt", "ca.crt", "coordinator.pub", ROSTER_FILE, SIGNATURE_FILE)
_FIELDS = {"kind": str, "site": str, "request": str, "number": int}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply that was read and that the coordinator signed."""

    site: str
    """Whom it is for."""
    request: str
    """SHA-256 in hex of the request that it answers."""
    number: int
    """Grows with every change of the federation."""
    manifest: bytes
    """The bytes of its manifest."""
    files: dict[str, bytes]
    """`client.crt`, `ca.crt`, `coordinator.pub`, `roster.json` and `roster.sig`."""


@contextmanager
def publishing(out: Path) -> Iterator[Record | None]:
    """Hold the folder of all parties for one change; afterwards every reply follows from it.

    Yields:
        The interrupted change that was carried out first, or None.

    Raises:
        CertificateError: another command is at work, or the folder cannot be written.
    """
    with changing(out) as finished:
        yield finished
        _write_replies(out)


def encode_reply(out: Path, site: str) -> bytes:
    """Return the reply that follows from what is in the folder of all parties.

    Raises:
        CertificateError: a file is missing or cannot be read.
    """
    folder, centre = out / "sites" / site / CURRENT, out / "superlink" / CURRENT
    key = read_signing_key(out / "coordinator" / "signing.key")
    files = {name: read_file(folder / name) for name in ("client.crt", "ca.crt")}
    files["coordinator.pub"] = encode_public(key.public_key())
    for name in (ROSTER_FILE, SIGNATURE_FILE):
        files[name] = read_file(centre / name)
    request = decode_request(read_file(folder / REQUEST_FILE), str(folder / REQUEST_FILE))
    lists = read_lists(centre / CRL_FILE, read_certificates(centre / "ca.crt"))
    fields = {
        "kind": "reply",
        "site": site,
        "request": request.digest,
        "number": read_number(lists),
    }
    manifest = seal(fields, files)
    signature = encode_signature(key.sign(CONTEXT + manifest))
    return encode_bundle({MANIFEST: manifest, **files, SIGNATURE: signature})


def decode_reply(content: bytes, coordinator: ed25519.Ed25519PublicKey, where: str) -> Reply:
    """Return what a reply holds after checking its signature.

    Args:
        content: the bundle.
        coordinator: who has to have signed it.
        where: what to call it in an error.

    Raises:
        CertificateError: it is not a reply, not whole, or signed by somebody else.
    """
    files = decode_bundle(content, (MANIFEST, *_FILES, SIGNATURE), where)
    try:
        coordinator.verify(decode_signature(files[SIGNATURE]), CONTEXT + files[MANIFEST])
    except (ValueError, InvalidSignature) as error:
        raise CertificateError(
            f"{where} is not signed by the coordinator that this site trusts; do not use it, and "
            "ask the coordinator by telephone."
        ) from error
    inside = {name: files[name] for name in _FILES}
    fields = unseal(files[MANIFEST], _FIELDS, inside, where)
    if fields["kind"] != "reply" or inside["coordinator.pub"] != encode_public(coordinator):
        raise CertificateError(f"{where} is not the coordinator's reply; name the right file.")
    return Reply(
        site=str(fields["site"]),
        request=str(fields["request"]),
        number=int(str(fields["number"])),
        manifest=files[MANIFEST],
        files=inside,
    )


def name_reply(out: Path, site: str) -> Path:
    """Return where a site's reply lies."""
    return out / REPLIES / f"{site}.reply.tar"


def read_leaf(chain: bytes, where: str) -> list[x509.Certificate]:
    """Return the certificates of a chain, leaf first.

    Raises:
        CertificateError: there are none.
    """
    try:
        return x509.load_pem_x509_certificates(chain)
    except ValueError as error:
        raise CertificateError(f"{where} holds no certificates; ask for a new one.") from error


def _write_replies(out: Path) -> None:
    """Write what has changed, and remove the replies of sites that are no longer enrolled."""
    sites, folder = list_enrolled(out), out / REPLIES
    try:
        if sites:
            folder.mkdir(mode=0o700, exist_ok=True)
        elif folder.exists():
            shutil.rmtree(folder)
        for path in folder.glob("*.reply.tar"):
            if path.name.removesuffix(".reply.tar") not in sites:
                path.unlink()
    except OSError as error:
        raise unwritable(folder, error) from error
    for site in sites:
        path, content = name_reply(out, site), encode_reply(out, site)
        if not path.exists() or read_file(path) != content:
            replace_file(path, content)
