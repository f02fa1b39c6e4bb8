"""The certificate authority: an offline root, two issuing authorities and their leaves.

The root key is needed only to make the issuing authorities; it may be moved away afterwards.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from certs.files import (
    encode_certificates,
    encode_key,
    read_certificates,
    read_tls_key,
    write_folder,
)
from certs.names import SITE_URI, name_host

ROOT_DAYS = 3650
ISSUING_DAYS = 1095
LEAF_DAYS = 90
# Clocks of sites differ by minutes: a new certificate has to be valid there at once.
CLOCK_SLACK = datetime.timedelta(minutes=10)


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


def make_authority(folder: Path, now: datetime.datetime) -> Authority:
    """Make a root and both issuing authorities and write them to a new folder.

    Args:
        folder: gets `ca.key` and `ca.crt` (the root), `server.*` and `sites.*`.
        now: when their validity starts, with a time zone.

    Raises:
        CertificateError: the folder cannot be written.
    """
    # Nothing but the two issuing authorities is ever signed by the root: a long key is free.
    root_key = ec.generate_private_key(ec.SECP384R1())
    root_name = _name("fedqlora root")
    root = _sign(
        _start(root_name, root_key.public_key(), now, ROOT_DAYS).issuer_name(root_name),
        root_key,
        _authority_extensions(path_length=None, purpose=None),
    )
    root_issuer = Issuer(root, root_key)
    server = _make_issuing(root_issuer, "server", ExtendedKeyUsageOID.SERVER_AUTH, now)
    sites = _make_issuing(root_issuer, "sites", ExtendedKeyUsageOID.CLIENT_AUTH, now)
    write_folder(
        folder,
        {
            "ca.key": encode_key(root_key),
            "ca.crt": encode_certificates(root),
            "server.key": encode_key(server.key),
            "server.crt": encode_certificates(server.certificate),
            "sites.key": encode_key(sites.key),
            "sites.crt": encode_certificates(sites.certificate),
        },
    )
    return Authority(root, server, sites)


def read_authority(folder: Path) -> Authority:
    """Return the authority in a folder; the root's key may be elsewhere.

    Raises:
        CertificateError: a file is missing or cannot be read.
    """
    return Authority(
        root=read_certificates(folder / "ca.crt")[0],
        server=_read_issuer(folder, "server"),
        sites=_read_issuer(folder, "sites"),
    )


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
    root: Issuer, side: str, purpose: x509.ObjectIdentifier, now: datetime.datetime
) -> Issuer:
    """Make one issuing authority; the purpose on it binds everything that it signs."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _start(_name(f"fedqlora {side} authority"), key.public_key(), now, ISSUING_DAYS)
    builder = builder.issuer_name(root.certificate.subject)
    extensions = _authority_extensions(path_length=0, purpose=purpose)
    return Issuer(_sign(builder, root.key, extensions), key)


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
    builder = _start(_name(subject), key, now, LEAF_DAYS, issuer.certificate.not_valid_after_utc)
    return _sign(
        builder.issuer_name(issuer.certificate.subject),
        issuer.key,
        [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_key_usage(ca=False), True),
            (x509.ExtendedKeyUsage([purpose]), False),
            (x509.SubjectAlternativeName(names), False),
        ],
    )


def _start(
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    days: int,
    latest: datetime.datetime | None = None,
) -> x509.CertificateBuilder:
    """Begin a certificate: subject, key, a random serial number and the validity."""
    end = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(end if latest is None else min(end, latest))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _authority_extensions(
    path_length: int | None, purpose: x509.ObjectIdentifier | None
) -> list[tuple[x509.ExtensionType, bool]]:
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=True, path_length=path_length), True),
        (_key_usage(ca=True), True),
    ]
    if purpose is not None:
        extensions.append((x509.ExtendedKeyUsage([purpose]), False))
    return extensions


def _sign(
    builder: x509.CertificateBuilder,
    key: ec.EllipticCurvePrivateKey,
    extensions: Sequence[tuple[x509.ExtensionType, bool]],
) -> x509.Certificate:
    """Add the extensions and the issuer's key identifier, then sign."""
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    for extension, critical in [*extensions, (identifier, False)]:
        builder = builder.add_extension(extension, critical)
    return builder.sign(key, hashes.SHA384() if key.key_size > 256 else hashes.SHA256())


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    """An authority signs certificates and revocation lists, a leaf only handshakes."""
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
