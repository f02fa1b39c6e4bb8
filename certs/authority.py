"""The certificate authority: an offline root, two issuing authorities and their leaves.

The root key is needed only to make the issuing authorities; it may be moved away afterwards.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from certs.certificate import key_usage, make_name, sign_certificate, start_certificate
from certs.chain import fits, name_subject
from certs.files import (
    CertificateError,
    encode_certificates,
    encode_key,
    read_certificates,
    read_root_key,
    read_tls_key,
    write_folder,
)
from certs.names import SITE_URI, name_host

ROOT_DAYS = 3650
ISSUING_DAYS = 1095
LEAF_DAYS = 90
CROSS_FILE = "cross.crt"


@dataclass(frozen=True)
class Issuer:
    """An issuing authority: its certificate and the key that signs leaves."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Authority:
    """What issues leaves: the root's certificate and one issuing authority for each side."""

    root: x509.Certificate
    server: Issuer
    sites: Issuer
    cross: x509.Certificate | None = None
    """The root's name and key once more, signed by the root before it: whoever trusts only that
    one accepts what this authority issues."""


def make_authority(
    folder: Path,
    now: datetime.datetime,
    *,
    passphrase: bytes | None = None,
    previous: Issuer | None = None,
) -> Authority:
    """Make a root and both issuing authorities and write them to a new folder.

    Args:
        folder: gets `ca.key` and `ca.crt` (the root), `server.*` and `sites.*`.
        now: when their validity starts, with a time zone.
        passphrase: encrypts the root's key; None leaves it open, for development only.
        previous: the root that this one follows: signs `cross.crt`.

    Raises:
        CertificateError: the folder cannot be written.
    """
    # Nothing but the two issuing authorities is ever signed by the root: a long key is free.
    root_key = ec.generate_private_key(ec.SECP384R1())
    suffix = "" if previous is None else f" {_count(previous.certificate) + 1}"
    root_name = make_name(f"fedqlora root{suffix}")
    extensions = _authority_extensions(path_length=None, purpose=None)
    builder = start_certificate(root_name, root_key.public_key(), now, ROOT_DAYS)
    root = sign_certificate(builder.issuer_name(root_name), root_key, extensions)
    issuer = Issuer(root, root_key)
    cross = None
    if previous is not None:
        latest = previous.certificate.not_valid_after_utc
        builder = start_certificate(root_name, root_key.public_key(), now, ROOT_DAYS, latest)
        builder = builder.issuer_name(previous.certificate.subject)
        cross = sign_certificate(builder, previous.key, extensions)
    server = _make_issuing(
        issuer, f"server authority{suffix}", ExtendedKeyUsageOID.SERVER_AUTH, now
    )
    sites = _make_issuing(issuer, f"sites authority{suffix}", ExtendedKeyUsageOID.CLIENT_AUTH, now)
    files = {
        "ca.key": encode_key(root_key, passphrase),
        "ca.crt": encode_certificates(root),
        "server.key": encode_key(server.key),
        "server.crt": encode_certificates(server.certificate),
        "sites.key": encode_key(sites.key),
        "sites.crt": encode_certificates(sites.certificate),
    }
    if cross is not None:
        files[CROSS_FILE] = encode_certificates(cross)
    write_folder(folder, files)
    return Authority(root, server, sites, cross)


def read_authority(folder: Path) -> Authority:
    """Return the authority in a folder; the root's key may be elsewhere.

    Raises:
        CertificateError: a file is missing or cannot be read.
    """
    cross = folder / CROSS_FILE
    return Authority(
        root=read_certificates(folder / "ca.crt")[0],
        server=_read_issuer(folder, "server"),
        sites=_read_issuer(folder, "sites"),
        cross=read_certificates(cross)[0] if cross.exists() else None,
    )


def read_root(folder: Path, passphrase: bytes | None) -> Issuer:
    """Return the root with its key, which only a rollover needs.

    Raises:
        MisuseError: the passphrase is missing or wrong.
        CertificateError: the key is elsewhere, or is not this root's.
    """
    root = Issuer(
        read_certificates(folder / "ca.crt")[0], read_root_key(folder / "ca.key", passphrase)
    )
    if not fits(root.key, root.certificate):
        raise CertificateError(
            f"{folder / 'ca.key'} is not the key of {folder / 'ca.crt'}; bring back the right one."
        )
    return root


def issue_server(
    issuer: Issuer,
    key: ec.EllipticCurvePublicKey,
    hosts: Sequence[str],
    now: datetime.datetime,
) -> x509.Certificate:
    """Return a SuperLink's certificate: server authentication only, valid for `hosts`.

    Args:
        issuer: the server authority.
        key: the SuperLink's public key.
        hosts: DNS names and IP addresses under which sites reach it.
        now: when the 90 days start, with a time zone.
    """
    return _issue_leaf(
        issuer,
        key,
        "superlink",
        [name_host(host) for host in hosts],
        ExtendedKeyUsageOID.SERVER_AUTH,
        now,
    )


def issue_site(
    issuer: Issuer, key: ec.EllipticCurvePublicKey, site: str, now: datetime.datetime
) -> x509.Certificate:
    """Return a site's certificate: client authentication only, the site named by a URI.

    Args:
        issuer: the sites authority.
        key: the site's public TLS key.
        site: its name; the certificate carries `urn:fedqlora:site:<name>`.
        now: when the 90 days start, with a time zone.
    """
    return _issue_leaf(
        issuer,
        key,
        site,
        [x509.UniformResourceIdentifier(f"{SITE_URI}{site}")],
        ExtendedKeyUsageOID.CLIENT_AUTH,
        now,
    )


def _make_issuing(
    root: Issuer, name: str, purpose: x509.ObjectIdentifier, now: datetime.datetime
) -> Issuer:
    """Make one issuing authority; the purpose on it binds everything that it signs."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = start_certificate(make_name(f"fedqlora {name}"), key.public_key(), now, ISSUING_DAYS)
    builder = builder.issuer_name(root.certificate.subject)
    extensions = _authority_extensions(path_length=0, purpose=purpose)
    return Issuer(sign_certificate(builder, root.key, extensions), key)


def _count(root: x509.Certificate) -> int:
    """The place of a root in the row of roots: the first one's name carries no number."""
    number = re.search(r" (\d+)$", name_subject(root))
    return int(number[1]) if number else 1


def _read_issuer(folder: Path, side: str) -> Issuer:
    return Issuer(
        read_certificates(folder / f"{side}.crt")[0], read_tls_key(folder / f"{side}.key")
    )


def _issue_leaf(
    issuer: Issuer,
    key: ec.EllipticCurvePublicKey,
    subject: str,
    names: Sequence[x509.GeneralName],
    purpose: x509.ObjectIdentifier,
    now: datetime.datetime,
) -> x509.Certificate:
    """Sign a leaf with one purpose; it never outlives its issuer."""
    builder = start_certificate(
        make_name(subject), key, now, LEAF_DAYS, issuer.certificate.not_valid_after_utc
    )
    return sign_certificate(
        builder.issuer_name(issuer.certificate.subject),
        issuer.key,
        [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (key_usage(ca=False), True),
            (x509.ExtendedKeyUsage([purpose]), False),
            (x509.SubjectAlternativeName(names), False),
        ],
    )


def _authority_extensions(
    path_length: int | None, purpose: x509.ObjectIdentifier | None
) -> list[tuple[x509.ExtensionType, bool]]:
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=True, path_length=path_length), True),
        (key_usage(ca=True), True),
    ]
    if purpose is not None:
        extensions.append((x509.ExtendedKeyUsage([purpose]), False))
    return extensions
