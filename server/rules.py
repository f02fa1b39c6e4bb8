"""Rules: what a SuperLink's key folder says about who may call, and a verdict on one call.

Everything is checked against `ca.crt` and `coordinator.pub` of the same folder: the revocation
lists must be signed by the authorities, the roster by the coordinator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from certs.chain import is_issued_by
from certs.files import CertificateError
from certs.names import SITE_URI, list_names
from certs.roster import encode_tls, read_roster
from fedqlora.errors import ConfigError
from fedqlora.keys import load_public_key
from fedqlora.tls import format_serial, read_key_file, resolve_current
from server.state import read_node_key

FILES = ("ca.crt", "crl.pem", "coordinator.pub", "roster.json", "roster.sig")
"""What is read."""

_MOST_KNOWN = 4096  # verdicts; nobody fills the memory
_CRL = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)


@dataclass(frozen=True)
class Verdict:
    """What is known of one certificate."""

    site: str
    """The site that it names; a word for it where it names none."""
    reason: str | None
    """Why it is refused; None if it is not."""
    until: float = 0.0
    """When it expires, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the key folder says."""

    authorities: Sequence[x509.Certificate]
    """Who may have issued a site's certificate."""
    revoked: frozenset[int]
    """Serial numbers."""
    lists_end: float
    """When the first revocation list is to be replaced by a newer one, in seconds since 1970."""
    tls: Mapping[str, str]
    """Site by digest of its TLS key."""
    nodes: Mapping[bytes, str]
    """Site by its SuperNode key, as Flower sends it (PEM)."""
    known: dict[bytes, Verdict] = field(default_factory=dict)
    """Certificates judged so far, which takes a thousand times longer than to look one up."""

    def refuse(self, certificate: bytes, node_key: bytes, now: float) -> Verdict | None:
        """The verdict on a call if it is refused, None if it may go on.

        Args:
            certificate: that of the connection (PEM).
            node_key: the SuperNode key that the call claims to be signed with (PEM).
            now: in seconds since 1970.
        """
        verdict = self.known.get(certificate)
        if verdict is None:
            if len(self.known) >= _MOST_KNOWN:
                self.known.clear()
            verdict = self.known[certificate] = self._judge(certificate)
        if verdict.reason is not None:
            return verdict
        if now > verdict.until:
            return Verdict(verdict.site, "its certificate has expired")
        if self.nodes.get(node_key) != verdict.site:
            return Verdict(verdict.site, "the SuperNode key of the call is not this site's")
        return None

    def _judge(self, pem: bytes) -> Verdict:
        """Judges a certificate by everything that stays as it is while the rules do."""
        try:
            leaf = x509.load_pem_x509_certificate(pem)
            names = list_names(leaf)
        except ValueError:
            return Verdict("of no name", "it shows no readable certificate")
        site = names[0].removeprefix(SITE_URI) if names else "of no name"
        serial = f"with serial {format_serial(leaf)}"
        key = leaf.public_key()
        if not any(is_issued_by(leaf, authority) for authority in self.authorities):
            return Verdict(site, f"its certificate {serial} is from an authority not in ca.crt")
        if leaf.serial_number in self.revoked:
            return Verdict(site, f"its certificate {serial} is revoked")
        owner = (
            self.tls.get(encode_tls(key)) if isinstance(key, ec.EllipticCurvePublicKey) else None
        )
        if owner is None:
            return Verdict(site, f"the key of its certificate {serial} is not in the roster")
        if names != [SITE_URI + owner]:
            return Verdict(site, f"its certificate {serial} holds the key of site {owner}")
        return Verdict(owner, None, leaf.not_valid_after_utc.timestamp())

    def describe(self) -> str:
        """What the log calls them."""
        sites = ", ".join(sorted(self.nodes.values())) or "none"
        return f"the roster of sites {sites}, with {len(self.revoked)} certificates revoked"


def load_rules(folder: Path) -> Rules:
    """Reads and checks what a SuperLink's key folder says about sites.

    Raises:
        ConfigError: a file is missing, unreadable or not signed by whom it has to be.
    """
    source = resolve_current(folder)
    try:
        authorities = x509.load_pem_x509_certificates(read_key_file(source, "ca.crt"))
        roster = read_roster(source, load_public_key(source / "coordinator.pub"))
    except ValueError:
        raise ConfigError(
            f"{source / 'ca.crt'} is not a PEM certificate: make it with `make certs`."
        ) from None
    except CertificateError as error:
        raise ConfigError(f"{error} `make certs` writes what is missing.") from None
    revoked, lists_end = _read_lists(source, authorities)
    tls = {digest: name for name, keys in roster.sites.items() for digest in keys.tls}
    nodes = {
        read_node_key(keys.supernode.encode(), f"the roster's entry of site {name}"): name
        for name, keys in roster.sites.items()
    }
    if len(nodes) < len(roster.sites) or len(tls) < sum(len(k.tls) for k in roster.sites.values()):
        raise ConfigError(f"{source / 'roster.json'} gives two sites the same key: make new ones.")
    return Rules(
        authorities=authorities, revoked=revoked, lists_end=lists_end, tls=tls, nodes=nodes
    )


def _read_lists(
    source: Path, authorities: Sequence[x509.Certificate]
) -> tuple[frozenset[int], float]:
    """Serial numbers in the lists of all authorities, and when the first list ends.

    Lists of others, which a rollover leaves behind, say nothing about a certificate that could
    be admitted, and are passed over.
    """
    path = source / "crl.pem"
    try:
        lists = [x509.load_pem_x509_crl(p) for p in _CRL.findall(read_key_file(source, path.name))]
    except ValueError:
        raise ConfigError(
            f"{path} holds something else than revocation lists: make it with `make certs`."
        ) from None
    revoked: set[int] = set()
    ends = []
    for authority in authorities:
        own = [one for one in lists if _is_list_of(one, authority)]
        if not own:
            raise ConfigError(
                f"{path} holds no revocation list that {authority.subject.rfc4514_string()} of "
                "ca.crt signed: make it with `make certs`."
            )
        newest = max(own, key=lambda one: one.last_update_utc)
        revoked |= {entry.serial_number for one in own for entry in one}
        ends.append(newest.next_update_utc.timestamp() if newest.next_update_utc else math.inf)
    return frozenset(revoked), min(ends)


def _is_list_of(one: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    """Whether an authority signed a revocation list."""
    key = authority.public_key()
    return (
        one.issuer == authority.subject
        and isinstance(key, ec.EllipticCurvePublicKey)
        and one.is_signature_valid(key)
    )
