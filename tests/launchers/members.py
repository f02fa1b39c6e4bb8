"""What a coordinator does to a test's key folder: rosters, revocation lists, single leaves."""

from __future__ import annotations

import datetime
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from certs.authority import issue_site, read_authority
from certs.files import encode_certificates, read_signing_key
from certs.roster import Roster, SiteKeys, read_roster, write_roster
from certs.site import collect_roster


def sign_roster(certs: Path, sites: Mapping[str, SiteKeys] | None = None) -> Roster:
    """Signs a roster of these sites, all by default, and gives it to the SuperLink."""
    key = read_signing_key(certs / "coordinator" / "signing.key")
    found = collect_roster(certs)
    roster = Roster(
        coordinator=found.coordinator,
        evaluator=found.evaluator,
        sites=found.sites if sites is None else sites,
    )
    folder = certs / "superlink" / "current"
    write_roster(folder, roster, key)
    (folder / "coordinator.pub").write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return roster


def read_present_roster(certs: Path) -> Roster:
    """The roster that the SuperLink has."""
    key = read_signing_key(certs / "coordinator" / "signing.key")
    return read_roster(certs / "superlink" / "current", key.public_key())


def make_list(
    certs: Path, serials: Collection[int], *, authority: str = "sites", days: float = 30
) -> bytes:
    """A revocation list of one of the authorities, PEM; `days` from now until it ends."""
    issuers = read_authority(certs / "authority")
    issuer = {"sites": issuers.sites, "server": issuers.server}[authority]
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(now - datetime.timedelta(days=60))
        .next_update(now + datetime.timedelta(days=days))
    )
    for serial in serials:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        )
    return builder.sign(issuer.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def revoke(certs: Path, serials: Collection[int] = (), *, days: float = 30) -> None:
    """Gives the SuperLink a list with exactly these serial numbers."""
    path = certs / "superlink" / "current" / "crl.pem"
    path.with_suffix(".new").write_bytes(make_list(certs, serials, days=days))
    path.with_suffix(".new").rename(path)


def make_leaf(
    certs: Path, site: str, key: ec.EllipticCurvePrivateKey, age_days: float = 0
) -> bytes:
    """A site's certificate with what issued it, PEM."""
    authority = read_authority(certs / "authority")
    now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=age_days)
    leaf = issue_site(authority.sites, key.public_key(), site, now)
    return encode_certificates(leaf, authority.sites.certificate)


def rotate(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes the next version of a key folder, changed in these files, and swaps `current`."""
    newest = max(int(re.sub(r"\D", "", path.name)) for path in folder.glob("v*"))
    version = f"v{newest + 1}"
    shutil.copytree(folder / "current", folder / version)
    for name, content in files.items():
        (folder / version / name).write_bytes(content)
    (folder / "next").symlink_to(version)
    (folder / "next").rename(folder / "current")
