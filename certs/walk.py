"""One walk over all parties' folders: how a finding becomes a row, a warning or a problem."""

from __future__ import annotations

import datetime
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519

from certs.chain import name_issuer
from certs.files import CURRENT, CertificateError, encode_public, read_file, read_signing_key
from certs.handshake import serve_serial
from certs.names import list_names
from certs.parties import list_sites, name_day
from certs.renewal import format_serial
from certs.report import Report, Row
from certs.roster import Roster, read_roster
from certs.validity import judge_certificate, renewal_due


class Walk:
    """One walk at one moment into one report."""

    def __init__(self, out: Path, now: datetime.datetime, connect: tuple[str, int] | None) -> None:
        self.report = Report()
        self.sites = list_sites(out)
        self.out = out
        self.now = now
        self.connect = connect
        self.coordinator: ed25519.Ed25519PublicKey | None = None
        self.roster: Roster | None = None
        with self.recorded():
            key = read_signing_key(out / "coordinator" / "signing.key")
            self.coordinator = key.public_key()
            self.roster = read_roster(out / "coordinator", self.coordinator)
            for name in self.roster.sites:
                self.report.require(
                    name in self.sites,
                    f"The roster names site {name} but {out / 'sites' / name} is missing; "
                    f"restore it.",
                )

    def add_row(
        self,
        name: str,
        key: Path,
        matches: bool | None,
        certificate: x509.Certificate | None = None,
        live: str | None = None,
        leaf: bool = True,
        advice: str | None = None,
    ) -> bool:
        """Record one key and judge mode, match and validity; True if its dates are good."""
        mode = "-"
        if key.exists():
            bits = stat.S_IMODE(key.stat().st_mode)
            mode = f"{bits:04o}"
            self.report.require(
                bits & 0o077 == 0,
                f"{key} has mode {mode} and can be read by others; run chmod 600 on it, "
                f"and replace it if others use this machine.",
            )
            self.report.require(
                matches is not False,
                f"{key} does not match its certificate, its public file or the signed roster; "
                f"restore it.",
            )
        if certificate is None:
            self.report.rows.append(Row(name=name, mode=mode, matches=matches))
            return True
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        self.report.rows.append(
            Row(
                name=name,
                issuer=name_issuer(certificate),
                names=list_names(certificate),
                days_left=(end - self.now).days,
                renewal=name_day(renewal_due(start, end)) if leaf else None,
                serial=format_serial(certificate),
                live=live,
                mode=mode,
                matches=matches,
            )
        )
        return judge_certificate(self.report, name, start, end, self.now, leaf=leaf, advice=advice)

    def shake(self, client: Path | None) -> str | None:
        """Make a handshake if there is an address; a refusal is a problem."""
        if self.connect is None:
            return None
        roots = (
            self.out / "superlink" / CURRENT / "root.crt" if client is None else client / "ca.crt"
        )
        with self.recorded():
            return serve_serial(self.connect, roots, client)
        return None

    def check_coordinator(self, folder: Path) -> None:
        """Check that a party verifies instructions with the coordinator's key."""
        path = folder / "coordinator.pub"
        with self.recorded():
            expected = None if self.coordinator is None else encode_public(self.coordinator)
            self.report.require(
                read_file(path) == expected,
                f"{path} is not the coordinator's public key; restore it.",
            )

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Turn a file that cannot be read into a problem and go on with the next party."""
        try:
            yield
        except CertificateError as error:
            self.report.require(False, str(error))
