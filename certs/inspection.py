"""What is wrong, or soon will be, with the keys and certificates of a federation."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cryptography import x509

from certs.chain import (
    accept_client,
    accept_server,
    fits,
    is_issued_by,
    name_subject,
)
from certs.change import CHANGE_FILE, NEXT_AUTHORITY
from certs.crl import CRL_FILE, find_issuer, list_revoked, name_end, read_lists
from certs.files import (
    CURRENT,
    CertificateError,
    is_encrypted,
    read_certificates,
    read_file,
    read_signing_key,
    read_supernode_key,
    read_tls_key,
)
from certs.parties import is_enrolled, read_site_keys
from certs.renewal import format_serial
from certs.reply import encode_reply, name_reply
from certs.report import Report, Row
from certs.roster import (
    ROSTER_FILE,
    SIGNATURE_FILE,
    SiteKeys,
    encode_signing,
    encode_supernode,
    encode_tls,
)
from certs.trust import read_trust
from certs.validity import judge_list
from certs.walk import Walk


def inspect_all(
    out: Path,
    *,
    now: datetime.datetime | None = None,
    connect: tuple[str, int] | None = None,
) -> Report:
    """Check every certificate, key file and roster entry in `out`; changes nothing.

    Checked are: validity (a warning under 30 days, a problem under 7), the chain of each leaf
    against what the other side really trusts, names, modes of key files, that each key fits its
    certificate, the roster's signature and that its entries are the keys in the folders, and the
    revocation list: signature, freshness, and that it names nobody in the roster.

    Args:
        out: the folder of all parties.
        now: the moment to check for, with a time zone; the present time if None.
        connect: host and port of the running SuperLink, to compare with what it serves.

    Raises:
        CertificateError: there are no keys in `out` at all.
    """
    if not (out / "authority").is_dir():
        raise CertificateError(f"{out} holds no certificate authority; make the keys first.")
    now = datetime.datetime.now(datetime.UTC) if now is None else now
    inspector = _Inspector(out, now, connect)
    inspector.inspect_authorities()
    inspector.inspect_superlink()
    inspector.inspect_signers()
    for name in inspector.sites:
        inspector.inspect_site(name)
    inspector.inspect_revocation()
    return inspector.report


class _Inspector(Walk):
    """What is looked at, party by party."""

    def inspect_authorities(self) -> None:
        """Check the root and what it has issued."""
        for folder, prefix in (
            (self.out / "authority", ""),
            (self.out / NEXT_AUTHORITY, "next "),
        ):
            if not folder.exists():
                continue
            with self.recorded():
                root = read_certificates(folder / "ca.crt")[0]
                for name, path in (
                    ("root", folder / "ca.crt"),
                    ("server authority", folder / "server.crt"),
                    ("sites authority", folder / "sites.crt"),
                ):
                    certificate = read_certificates(path)[0]
                    key = path.with_suffix(".key")
                    # The root's key may be kept elsewhere or have a passphrase: it is not needed
                    # to issue leaves.
                    closed = name == "root" and (not key.exists() or is_encrypted(key))
                    matches = None if closed else fits(read_tls_key(key), certificate)
                    self.add_row(f"{prefix}{name}", key, matches, certificate, leaf=False)
                    self.report.require(
                        is_issued_by(certificate, root),
                        f"{path} is not issued by {folder / 'ca.crt'}; restore it.",
                    )

    def inspect_superlink(self) -> None:
        """Check the SuperLink's leaf as each site and each local process will."""
        folder = self.out / "superlink" / CURRENT
        path = folder / "server.crt"
        with self.recorded():
            chain = read_certificates(path)
            matches = fits(read_tls_key(folder / "server.key"), chain[0])
            live = self.shake(None)
            if not self.add_row("superlink", folder / "server.key", matches, chain[0], live):
                return
            self.report.require(
                live in (None, format_serial(chain[0])),
                f"The running SuperLink serves serial {live} and not that of {path}; see its log.",
            )
            sites = [self.out / "sites" / name / CURRENT / "ca.crt" for name in self.sites]
            for anchors in (folder / "root.crt", *sites):
                self.report.require(
                    accept_server(chain, read_certificates(anchors), self.now),
                    f"{path} is not accepted by what trusts {anchors}; restore both files.",
                )

    def inspect_signers(self) -> None:
        """Check the signing keys of the centre: coordinator and evaluator."""
        for name in ("coordinator", "evaluator"):
            path = self.out / name / "signing.key"
            with self.recorded():
                public = encode_signing(read_signing_key(path).public_key())
                listed = getattr(self.roster, name, None)
                self.add_row(f"{name} signing", path, public == listed)
        self.check_coordinator(self.out / "evaluator")

    def inspect_site(self, name: str) -> None:
        """Check a site's three keys, and its leaf as the SuperLink will."""
        folder = self.out / "sites" / name / CURRENT
        if is_enrolled(folder):
            self.inspect_enrolled(name)
            return
        listed = self.roster.sites.get(name) if self.roster else None
        with self.recorded():
            chain = read_certificates(folder / "client.crt")
            tls = read_tls_key(folder / "client.key")
            # Only the first one listed is the present key: a site that still has the one before
            # it missed a rotation.
            public = encode_tls(tls.public_key())
            matches = fits(tls, chain[0]) and listed is not None and listed.tls[:1] == (public,)
            live = format_serial(chain[0]) if self.shake(folder) else None
            if self.add_row(f"site {name}", folder / "client.key", matches, chain[0], live):
                self._check_client(name, chain)
        with self.recorded():
            public = encode_supernode(read_supernode_key(folder / "supernode.key").public_key())
            matches = _is_listed(listed, supernode=public)
            matches &= read_file(folder / "supernode.pub").strip() == public.encode("ascii")
            self.add_row(f"site {name} supernode", folder / "supernode.key", matches)
        with self.recorded():
            signing = encode_signing(read_signing_key(folder / "signing.key").public_key())
            matches = _is_listed(listed, signing=signing)
            self.add_row(f"site {name} signing", folder / "signing.key", matches)
        self.check_coordinator(folder)

    def inspect_enrolled(self, name: str) -> None:
        """Check a site that keeps its keys: certificate, public keys, and the reply to it."""
        folder = self.out / "sites" / name / CURRENT
        listed = self.roster.sites.get(name) if self.roster else None
        with self.recorded():
            chain, keys = read_certificates(folder / "client.crt"), read_site_keys(folder)
            matches = listed is not None and listed.tls[:1] == keys.tls
            # No such file is here, and so no mode is shown.
            advice = "have the site send a request to renew"
            key = folder / "client.key"
            if self.add_row(f"site {name}", key, matches, chain[0], advice=advice):
                self._check_client(name, chain)
            for kind, same in (
                ("supernode", _is_listed(listed, supernode=keys.supernode)),
                ("signing", _is_listed(listed, signing=keys.signing)),
            ):
                self.add_row(f"site {name} {kind}", folder / f"{kind}.key", same)
                matches = matches and same
            self.report.require(
                matches, f"The public keys in {folder} are not those of the roster; restore it."
            )
            reply = name_reply(self.out, name)
            self.report.require(
                reply.exists() and read_file(reply) == encode_reply(self.out, name),
                f"{reply} is not up to date; run make.",
            )
        self.check_coordinator(folder)

    def _check_client(self, name: str, chain: Sequence[x509.Certificate]) -> None:
        anchors = self.out / "superlink" / CURRENT / "ca.crt"
        self.report.require(
            accept_client(chain, read_certificates(anchors), name, self.now),
            f"{self.out / 'sites' / name / CURRENT / 'client.crt'} is not accepted as site {name} "
            f"by what trusts {anchors}; restore both files.",
        )

    def inspect_revocation(self) -> None:
        """Check the revocation list, and that the SuperLink knows the roster that was signed."""
        folder = self.out / "superlink" / CURRENT
        path = folder / CRL_FILE
        with self.recorded():
            issuers = [one.certificate for one in read_trust(self.out).site_issuers]
            lists = read_lists(path, issuers)
            signers = [find_issuer(one, issuers) for one in lists]
            for one, signer in zip(lists, signers, strict=True):
                end, issuer = name_end(one), name_subject(signer) if signer else "-"
                left = (end - self.now).days
                row = Row(name="revocations", issuer=issuer, days_left=left, mode="-", matches=None)
                self.report.rows.append(row)
                judge_list(self.report, str(path), end, self.now)
            self.report.require(
                all(issuer in signers for issuer in issuers),
                f"{path} lacks the list of an authority; run make or rotate.",
            )
            revoked = list_revoked(lists)
            for name in self.sites:
                leaf = read_certificates(self.out / "sites" / name / CURRENT / "client.crt")[0]
                self.report.require(
                    leaf.serial_number not in revoked,
                    f"The present certificate of site {name} is on the revocation list {path}; "
                    f"run rotate, or revoke the site.",
                )
        for name in (ROSTER_FILE, SIGNATURE_FILE):
            with self.recorded():
                self.report.require(
                    read_file(folder / name) == read_file(self.out / "coordinator" / name),
                    f"{folder / name} is not the coordinator's; run make.",
                )
        self.check_coordinator(folder)
        self.report.require(
            not (self.out / CHANGE_FILE).exists(),
            f"A change of {self.out} was interrupted; run the command that made it again.",
        )


def _is_listed(listed: SiteKeys | None, **keys: str) -> bool:
    """Tell whether the roster's entry holds these keys."""
    return listed is not None and keys.items() <= asdict(listed).items()
