"""What is wrong, or soon will be, with the keys and certificates of a federation."""

from __future__ import annotations

import datetime
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519

from certs.chain import accept_client, accept_server, fits, is_issued_by, name_issuer
from certs.files import (
    CURRENT,
    CertificateError,
    encode_public,
    read_certificates,
    read_file,
    read_signing_key,
    read_supernode_key,
    read_tls_key,
)
from certs.names import list_names
from certs.parties import list_sites
from certs.report import Report, Row
from certs.roster import (
    Roster,
    SiteKeys,
    encode_signing,
    encode_supernode,
    encode_tls,
    read_roster,
)

WARNING_DAYS = 30
FAILURE_DAYS = 7


def inspect_all(out: Path, *, now: datetime.datetime | None = None) -> Report:
    """Check every certificate, key file and roster entry in `out`; changes nothing.

    Checked are: validity (a warning under 30 days, a problem under 7), the chain of each leaf
    against what the other side really trusts, names, modes of key files, that each key fits its
    certificate, the roster's signature and that its entries are the keys in the folders.

    Args:
        out: the folder of all parties.
        now: the moment to check for, with a time zone; the present time if None.

    Raises:
        CertificateError: there are no keys in `out` at all.
    """
    if not (out / "authority").is_dir():
        raise CertificateError(f"{out} holds no certificate authority; make the keys first.")
    inspector = _Inspector(out, datetime.datetime.now(datetime.UTC) if now is None else now)
    inspector.inspect_authorities()
    inspector.inspect_superlink()
    inspector.inspect_signers()
    for name in inspector.sites:
        inspector.inspect_site(name)
    return inspector.report


class _Inspector:
    """One walk over all parties' folders, at one moment, into one report."""

    def __init__(self, out: Path, now: datetime.datetime) -> None:
        self.report = Report()
        self.sites = list_sites(out)
        self._out = out
        self._now = now
        self._coordinator: ed25519.Ed25519PublicKey | None = None
        self._roster: Roster | None = None
        with self._recorded():
            key = read_signing_key(out / "coordinator" / "signing.key")
            self._coordinator = key.public_key()
            self._roster = read_roster(out / "coordinator", self._coordinator)
            for name in self._roster.sites:
                self.report.require(
                    name in self.sites,
                    f"The roster names site {name} but {out / 'sites' / name} is missing; "
                    f"restore it.",
                )

    def inspect_authorities(self) -> None:
        """Check the root and what it has issued."""
        folder = self._out / "authority"
        with self._recorded():
            root = read_certificates(folder / "ca.crt")[0]
            for name, path in (
                ("root", folder / "ca.crt"),
                ("server authority", folder / "server.crt"),
                ("sites authority", folder / "sites.crt"),
            ):
                certificate = read_certificates(path)[0]
                key = path.with_suffix(".key")
                # The root's key may be kept elsewhere: it is not needed to issue leaves.
                here = key.exists() or name != "root"
                matches = fits(read_tls_key(key), certificate) if here else None
                self._add_row(name, key, matches, certificate)
                self.report.require(
                    is_issued_by(certificate, root),
                    f"{path} is not issued by {folder / 'ca.crt'}; restore it.",
                )

    def inspect_superlink(self) -> None:
        """Check the SuperLink's leaf as each site and each local process will."""
        folder = self._out / "superlink" / CURRENT
        path = folder / "server.crt"
        with self._recorded():
            chain = read_certificates(path)
            matches = fits(read_tls_key(folder / "server.key"), chain[0])
            if not self._add_row("superlink", folder / "server.key", matches, chain[0]):
                return
            sites = [self._out / "sites" / name / CURRENT / "ca.crt" for name in self.sites]
            for anchors in (folder / "root.crt", *sites):
                self.report.require(
                    accept_server(chain, read_certificates(anchors), self._now),
                    f"{path} is not accepted by what trusts {anchors}; restore both files.",
                )

    def inspect_signers(self) -> None:
        """Check the signing keys of the centre: coordinator and evaluator."""
        for name in ("coordinator", "evaluator"):
            path = self._out / name / "signing.key"
            with self._recorded():
                public = encode_signing(read_signing_key(path).public_key())
                listed = getattr(self._roster, name, None)
                self._add_row(f"{name} signing", path, public == listed)
        self._check_coordinator(self._out / "evaluator")

    def inspect_site(self, name: str) -> None:
        """Check a site's three keys, and its leaf as the SuperLink will."""
        folder = self._out / "sites" / name / CURRENT
        listed = self._roster.sites.get(name) if self._roster else None
        with self._recorded():
            chain = read_certificates(folder / "client.crt")
            tls = read_tls_key(folder / "client.key")
            matches = fits(tls, chain[0]) and _is_listed(listed, tls=encode_tls(tls.public_key()))
            if self._add_row(f"site {name}", folder / "client.key", matches, chain[0]):
                anchors = self._out / "superlink" / CURRENT / "ca.crt"
                self.report.require(
                    accept_client(chain, read_certificates(anchors), name, self._now),
                    f"{folder / 'client.crt'} is not accepted as site {name} by what trusts "
                    f"{anchors}; restore both files.",
                )
        with self._recorded():
            public = encode_supernode(read_supernode_key(folder / "supernode.key").public_key())
            matches = _is_listed(listed, supernode=public)
            matches &= read_file(folder / "supernode.pub").strip() == public.encode("ascii")
            self._add_row(f"site {name} supernode", folder / "supernode.key", matches)
        with self._recorded():
            signing = encode_signing(read_signing_key(folder / "signing.key").public_key())
            matches = _is_listed(listed, signing=signing)
            self._add_row(f"site {name} signing", folder / "signing.key", matches)
        self._check_coordinator(folder)

    def _add_row(
        self,
        name: str,
        key: Path,
        matches: bool | None,
        certificate: x509.Certificate | None = None,
    ) -> bool:
        """Record one key and judge mode, match and validity; True if its dates are good."""
        mode = "-"
        if matches is not None:
            bits = stat.S_IMODE(key.stat().st_mode)
            mode = f"{bits:04o}"
            self.report.require(
                bits & 0o077 == 0,
                f"{key} has mode {mode} and can be read by others; run chmod 600 on it, "
                f"and replace it if others use this machine.",
            )
            self.report.require(
                matches,
                f"{key} does not match its certificate, its public file or the signed roster; "
                f"restore it.",
            )
        if certificate is None:
            self.report.rows.append(Row(name=name, mode=mode, matches=matches))
            return True
        left = certificate.not_valid_after_utc - self._now
        self.report.rows.append(
            Row(
                name=name,
                issuer=name_issuer(certificate),
                names=list_names(certificate),
                days_left=left.days,
                mode=mode,
                matches=matches,
            )
        )
        return self._check_days(name, certificate)

    def _check_days(self, name: str, certificate: x509.Certificate) -> bool:
        """Judge when a certificate starts and ends; True if it is valid now."""
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        days = (end - self._now).days
        if self._now < start:
            self.report.require(
                False,
                f"The certificate of {name} is not valid before {start:%Y-%m-%d %H:%M} UTC; "
                f"set this machine's clock.",
            )
        elif end < self._now:
            self.report.require(
                False, f"The certificate of {name} ended on {end:%Y-%m-%d}; issue a new one."
            )
        elif days < FAILURE_DAYS:
            self.report.require(
                False, f"The certificate of {name} ends in {days} days; issue a new one now."
            )
        elif days < WARNING_DAYS:
            self.report.warnings.append(
                f"The certificate of {name} ends in {days} days; plan a new one."
            )
        return start <= self._now <= end

    def _check_coordinator(self, folder: Path) -> None:
        """Check that a party verifies instructions with the coordinator's key."""
        path = folder / "coordinator.pub"
        with self._recorded():
            expected = None if self._coordinator is None else encode_public(self._coordinator)
            self.report.require(
                read_file(path) == expected,
                f"{path} is not the coordinator's public key; restore it.",
            )

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Turn a file that cannot be read into a problem and go on with the next party."""
        try:
            yield
        except CertificateError as error:
            self.report.require(False, str(error))


def _is_listed(listed: SiteKeys | None, **keys: str) -> bool:
    """Tell whether the roster's entry holds these keys."""
    return listed is not None and keys.items() <= asdict(listed).items()
