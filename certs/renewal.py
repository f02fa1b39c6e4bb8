"""What the next version of a party's folder holds: what stays, and what is issued anew."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from certs.authority import issue_server, issue_site
from certs.crl import CRL_FILE, list_revoked, read_lists, read_number, sign_lists
from certs.files import (
    CURRENT,
    CertificateError,
    encode_key,
    encode_public,
    read_certificates,
    read_signing_key,
)
from certs.names import list_names
from certs.parties import REQUEST_FILE
from certs.request import decode_request
from certs.roster import Roster, SiteKeys, read_roster, sign_roster
from certs.trust import Trust, read_trust
from certs.versions import list_versions, read_version


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Everything that a change starts from, read once and checked."""

    out: Path
    """The folder of all parties."""
    now: datetime.datetime
    """When new validity starts, with a time zone."""
    trust: Trust
    """The authorities in force."""
    coordinator: ed25519.Ed25519PrivateKey
    """Signs the roster."""
    roster: Roster
    """What the coordinator signed last."""
    revoked: Mapping[int, datetime.datetime]
    """When each serial on the revocation list was revoked."""
    number: int
    """The revocation list's number."""

    def find_keys(self, site: str) -> SiteKeys:
        """Return a site's keys as the coordinator signed them.

        Raises:
            CertificateError: it is not in the roster.
        """
        if site not in self.roster.sites:
            raise CertificateError(f"The roster lacks site {site}; run `make certs` first.")
        return self.roster.sites[site]

    def renew_superlink(
        self,
        roster: Roster,
        *,
        trust: Trust | None = None,
        revoked: Mapping[int, datetime.datetime] | None = None,
        leaf: bool = False,
        hosts: Sequence[str] = (),
    ) -> dict[str, bytes]:
        """Return the SuperLink's next files; the revocation list in it is always a new one.

        Args:
            roster: to be signed.
            trust: the authorities to trust; those in force if None.
            revoked: additions to the revocation list.
            leaf: make a new key and certificate.
            hosts: names for a new certificate, besides those of the old one.
        """
        trust = trust or self.trust
        folder = self.out / "superlink"
        files = read_version(folder)
        old = read_certificates(folder / CURRENT / "server.crt")[0]
        if leaf:
            key = ec.generate_private_key(ec.SECP256R1())
            names = list(dict.fromkeys([*list_names(old), *hosts]))
            old = issue_server(trust.issuing.server, key.public_key(), names, self.now)
            files["server.key"] = encode_key(key)
        serials = {**self.revoked, **(revoked or {})}
        return files | {
            "server.crt": trust.chain(old),
            "ca.crt": trust.clients,
            "root.crt": trust.roots,
            CRL_FILE: sign_lists(trust.site_issuers, serials, self.now, number=self.number),
            "coordinator.pub": encode_public(self.coordinator.public_key()),
            **sign_roster(roster, self.coordinator),
        }

    def renew_site(
        self, site: str, *, trust: Trust | None = None, leaf: bool = False
    ) -> dict[str, bytes]:
        """Return a site's next files: SuperNode and signing key always stay.

        Args:
            site: its name.
            trust: the authorities to trust; those in force if None.
            leaf: make a new certificate, and a new TLS key unless the site keeps its own.
        """
        trust = trust or self.trust
        folder = self.out / "sites" / site
        files = read_version(folder)
        old = read_certificates(folder / CURRENT / "client.crt")[0]
        if leaf and REQUEST_FILE in files:
            public = decode_request(files[REQUEST_FILE], str(folder / CURRENT / REQUEST_FILE))
            old = issue_site(trust.issuing.sites, public.client, site, self.now)
        elif leaf:
            key = ec.generate_private_key(ec.SECP256R1())
            old = issue_site(trust.issuing.sites, key.public_key(), site, self.now)
            files["client.key"] = encode_key(key)
        return files | {"client.crt": trust.chain(old), "ca.crt": trust.roots}


def read_federation(out: Path, now: datetime.datetime) -> Federation:
    """Read what a change starts from.

    Raises:
        CertificateError: a file is missing, or not signed by whom it should be.
    """
    trust = read_trust(out)
    coordinator = read_signing_key(out / "coordinator" / "signing.key")
    path = out / "superlink" / CURRENT / CRL_FILE
    # A folder that an earlier version of this code made has no list; its next version has one.
    lists = (
        read_lists(path, [one.certificate for one in trust.site_issuers]) if path.exists() else []
    )
    return Federation(
        out=out,
        now=now,
        trust=trust,
        coordinator=coordinator,
        roster=read_roster(out / "coordinator", coordinator.public_key()),
        revoked=list_revoked(lists),
        number=read_number(lists),
    )


def list_leaves(folder: Path) -> list[x509.Certificate]:
    """Return the leaves in all versions of a site's folder, oldest first, each once.

    One that cannot be read is left out: it has no serial to revoke, and must not keep a site from
    being revoked. Its key leaves the roster all the same.
    """
    leaves = []
    for version in list_versions(folder):
        with suppress(CertificateError):
            leaves.append(read_certificates(folder / version / "client.crt")[0])
    return list(dict.fromkeys(leaves))


def format_serial(leaf: x509.Certificate) -> str:
    """Return a serial number in hex, as `openssl x509 -serial` prints it."""
    text = f"{leaf.serial_number:X}"
    return text.zfill(len(text) + len(text) % 2)
