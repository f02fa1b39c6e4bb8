"""A site's own side of enrolment: it makes its keys, and a request that holds their public halves.

Everything lies in one folder of the site:

    <site>.request.tar    to be sent to the coordinator
    request/              keys of a request that is not answered yet, and whom they trust
    supernode/, trainer/  what the site works with, each a version behind `current`

A key file is written once, with mode 0600, and never leaves this folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from certs.files import (
    CURRENT,
    CertificateError,
    MisuseError,
    encode_certificates,
    encode_key,
    encode_public,
    read_certificates,
    read_file,
    read_public_key,
    read_signing_key,
    read_supernode_key,
    replace_file,
    write_folder,
)
from certs.names import check_sites
from certs.parties import REQUEST_FILE
from certs.request import PrivateKeys, Request, decode_request, encode_request, name_roots
from certs.roster import encode_signing, encode_supernode
from certs.versions import sweep

PENDING = "request"
SUPERNODE = "supernode"
TRAINER = "trainer"


@dataclass(frozen=True, kw_only=True)
class Application:
    """A request that lies ready to be sent."""

    path: Path
    """The bundle."""
    request: Request
    """What it holds."""
    anew: bool
    """Whether this call made it; False if it was there before."""


def make_request(out: Path, site: str, trust: Path) -> Application:
    """Make a new site's keys and its request, once; a rerun returns the same.

    Args:
        out: the site's folder; made if missing.
        site: its name, as the coordinator gave it.
        trust: holds `root.crt` and `coordinator.pub`, which the site has verified.

    Raises:
        MisuseError: the name cannot be one, or the folder belongs to another site.
        CertificateError: a file cannot be read or written, or an earlier request trusts others.
    """
    check_sites([site])
    roots = read_certificates(trust / "root.crt")
    coordinator = read_public_key(trust / "coordinator.pub")
    sweep_home(out)
    present = find_request(out)
    if present is not None:
        _check_same(present, out, site)
        if present.coordinator != encode_signing(coordinator) or (
            (out / PENDING).exists() and list(present.roots) != name_roots(roots)
        ):
            raise CertificateError(
                f"{out} was made with another trust than {trust}; check which one is the "
                "coordinator's, and choose a new folder for a new request."
            )
        return _publish(out, present, anew=False)
    keys = PrivateKeys(
        client=ec.generate_private_key(ec.SECP256R1()),
        # Flower makes its own SuperNode keys on P-384.
        supernode=ec.generate_private_key(ec.SECP384R1()),
        signing=ed25519.Ed25519PrivateKey.generate(),
    )
    content = encode_request(site, keys, roots, coordinator)
    trusted = {
        "ca.crt": encode_certificates(*roots),
        "coordinator.pub": encode_public(coordinator),
    }
    return _write(out, keys, content, trusted)


def renew_request(out: Path, site: str) -> Application:
    """Make a new TLS key and the request to renew; SuperNode and signing key stay.

    Args:
        out: the site's folder, in which a reply was accepted.
        site: its name.

    Raises:
        MisuseError: there is nothing to renew yet, or the folder belongs to another site.
        CertificateError: a file cannot be read or written.
    """
    check_sites([site])
    sweep_home(out)
    connection, trainer = out / SUPERNODE / CURRENT, out / TRAINER / CURRENT
    if not connection.exists():
        raise MisuseError(
            f"{out} holds no accepted reply; send the first request, and accept its reply."
        )
    present = find_request(out)
    if present is not None:
        _check_same(present, out, site)
        if (out / PENDING).exists():
            return _publish(out, present, anew=False)
    keys = PrivateKeys(
        client=ec.generate_private_key(ec.SECP256R1()),
        supernode=read_supernode_key(connection / "supernode.key"),
        signing=read_signing_key(trainer / "signing.key"),
    )
    kept = {
        "ca.crt": read_file(connection / "ca.crt"),
        "coordinator.pub": read_file(trainer / "coordinator.pub"),
        # OpenSSH's format has random bytes in it: written again, the same key would look new.
        "supernode.key": read_file(connection / "supernode.key"),
    }
    content = encode_request(
        site,
        keys,
        read_certificates(connection / "ca.crt"),
        read_public_key(trainer / "coordinator.pub"),
        renews=read_certificates(connection / "client.crt")[0],
    )
    return _write(out, keys, content, kept)


def find_request(out: Path) -> Request | None:
    """Return the site's last request: the one that waits, else the one that was granted.

    Raises:
        CertificateError: it is there and cannot be read.
    """
    for folder in (out / PENDING, out / SUPERNODE / CURRENT):
        if folder.exists():
            path = folder / REQUEST_FILE
            return decode_request(read_file(path), str(path))
    return None


def _write(out: Path, keys: PrivateKeys, content: bytes, kept: dict[str, bytes]) -> Application:
    """Write keys, request and what is kept in one step, then the copy that is sent."""
    request = decode_request(content, "the request")
    files = {
        "client.key": encode_key(keys.client),
        "supernode.key": keys.supernode.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        ),
        "supernode.pub": encode_supernode(keys.supernode.public_key()).encode("ascii") + b"\n",
        "signing.key": encode_key(keys.signing),
        REQUEST_FILE: content,
        **kept,
    }
    write_folder(out / PENDING, files)
    return _publish(out, request, anew=True)


def _publish(out: Path, request: Request, *, anew: bool) -> Application:
    """Put the request where it is sent from, also where an interrupted call has not."""
    path = out / f"{request.site}.request.tar"
    if not path.exists() or read_file(path) != request.content:
        replace_file(path, request.content)
    return Application(path=path, request=request, anew=anew)


def _check_same(present: Request, out: Path, site: str) -> None:
    if present.site != site:
        raise MisuseError(
            f"{out} holds the keys of site {present.site}; correct --site or choose another folder."
        )


def sweep_home(out: Path) -> None:
    """Remove what an interrupted call has left hidden, keys among it; it never counted."""
    if not out.is_dir():
        return
    for name in (SUPERNODE, TRAINER):
        sweep(out / name)
    for one in out.iterdir():
        # Two dots: what was hidden, and was itself not whole yet.
        if re.fullmatch(
            r"\.{1,2}(request|supernode|trainer)(\..*)?|\..+\.request\.tar\..+", one.name
        ):
            sweep(out, one.name)
