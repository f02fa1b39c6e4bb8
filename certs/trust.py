"""The authorities in force: one, or two while a rollover lasts, and what parties are given of them.

Whatever is written gives every party all authorities in force, in full. So a change that falls
between two stages of a rollover neither undoes nor hampers it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from certs.authority import Authority, Issuer, read_authority
from certs.chain import is_issued_by
from certs.change import NEXT_AUTHORITY
from certs.files import CURRENT, CertificateError, encode_certificates, read_certificates


@dataclass(frozen=True)
class Trust:
    """The authorities in force."""

    authorities: tuple[Authority, ...]
    """The present one, then the next one if a rollover has begun."""
    issuing: Authority
    """The one that issues leaves: the last one from the stage `switch` on."""

    @property
    def roots(self) -> bytes:
        """What sites and processes beside the SuperLink trust in it (PEM)."""
        return encode_certificates(*(one.root for one in self.authorities))

    @property
    def clients(self) -> bytes:
        """What the SuperLink trusts in its clients: the sites authorities alone (PEM)."""
        return encode_certificates(*(one.certificate for one in self.site_issuers))

    @property
    def site_issuers(self) -> list[Issuer]:
        """The sites authorities."""
        return [one.sites for one in self.authorities]

    def chain(self, leaf: x509.Certificate) -> bytes:
        """Return a leaf with what leads from it to each root in force (PEM).

        Raises:
            CertificateError: no authority in force has issued it.
        """
        for one in self.authorities:
            for issuer in (one.server, one.sites):
                if not is_issued_by(leaf, issuer.certificate):
                    continue
                # Sites that know only the root before this one need the way to it.
                cross = [one.cross] if issuer is one.server and one.cross else []
                return encode_certificates(leaf, issuer.certificate, *cross)
        raise CertificateError(
            f"The certificate of {leaf.subject.rfc4514_string()} comes from no authority in force; "
            "restore its folder."
        )


def read_trust(out: Path) -> Trust:
    """Return the authorities in force in the folder of all parties.

    Raises:
        CertificateError: a file is missing or cannot be read.
    """
    present = read_authority(out / "authority")
    if not (out / NEXT_AUTHORITY).exists():
        return Trust((present,), present)
    following = read_authority(out / NEXT_AUTHORITY)
    leaf = read_certificates(out / "superlink" / CURRENT / "server.crt")[0]
    switched = is_issued_by(leaf, following.server.certificate)
    return Trust((present, following), following if switched else present)
