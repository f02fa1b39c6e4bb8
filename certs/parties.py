"""The folder of each party: SuperLink, coordinator, evaluator and site.

Every folder is whole when it appears and can be handed out or mounted alone. Each `make_`
function writes one and returns the line that says what was made, where and until when.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from certs.authority import issue_server, issue_site
from certs.change import REVOKED_FILE
from certs.crl import CRL_FILE, sign_lists
from certs.files import (
    CURRENT,
    CertificateError,
    encode_key,
    encode_public,
    read_file,
    read_public_key,
    read_signing_key,
    read_supernode_key,
    read_supernode_public,
    read_tls_key,
    write_folder,
)
from certs.names import list_names
from certs.roster import (
    Roster,
    SiteKeys,
    encode_signing,
    encode_supernode,
    encode_tls,
    sign_roster,
)
from certs.trust import Trust

REQUEST_FILE = "request.tar"
"""The request that a site was admitted with last, in the folder of a site that keeps its keys."""


def list_sites(out: Path, *, revoked: bool = False) -> list[str]:
    """Return the names of the sites whose keys are in `out`, sorted.

    Args:
        out: the folder of all parties.
        revoked: whether those that were revoked count as well.
    """
    if not (out / "sites").is_dir():
        return []
    return sorted(
        one.name
        for one in (out / "sites").iterdir()
        # A folder with a dot is one that an interrupted call did not finish.
        if one.is_dir()
        and not one.name.startswith(".")
        and (revoked or not (one / REVOKED_FILE).exists())
    )


def list_enrolled(out: Path) -> list[str]:
    """Return the names of the sites that keep their private keys themselves, sorted."""
    return [site for site in list_sites(out) if is_enrolled(out / "sites" / site / CURRENT)]


def list_kept(out: Path) -> list[str]:
    """Return the names of the sites whose keys are all in `out`, so that it can connect as them."""
    return [site for site in list_sites(out) if site not in list_enrolled(out)]


def is_enrolled(folder: Path) -> bool:
    """Tell whether a version of a site's folder has its request in the place of private keys."""
    return (folder / REQUEST_FILE).exists()


def read_site_keys(folder: Path) -> SiteKeys:
    """Return the public keys of the site whose key files, or public halves, are in `folder`.

    Raises:
        CertificateError: a key is missing or cannot be read.
    """
    if is_enrolled(folder):
        return SiteKeys(
            signing=encode_signing(read_public_key(folder / "signing.pub")),
            supernode=encode_supernode(read_supernode_public(folder / "supernode.pub")),
            tls=(digest_leaf(read_file(folder / "client.crt")),),
        )
    return SiteKeys(
        signing=encode_signing(read_signing_key(folder / "signing.key").public_key()),
        supernode=encode_supernode(read_supernode_key(folder / "supernode.key").public_key()),
        tls=(encode_tls(read_tls_key(folder / "client.key").public_key()),),
    )


def make_superlink(
    out: Path,
    trust: Trust,
    hosts: Sequence[str],
    coordinator: ed25519.Ed25519PrivateKey,
    roster: Roster,
    revoked: Mapping[int, datetime.datetime],
    now: datetime.datetime,
) -> str:
    """Make the SuperLink's TLS key and certificate, and what it knows of the sites.

    `ca.crt` is what it trusts in its clients, the sites authority alone; `root.crt` is what
    processes beside it (SuperExec, the `flwr` command) have to trust in it. `crl.pem` and the
    roster say who of those clients may still come.

    Raises:
        CertificateError: the folder cannot be written.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = issue_server(trust.issuing.server, key.public_key(), hosts, now)
    files = {
        "server.key": encode_key(key),
        "server.crt": trust.chain(leaf),
        "ca.crt": trust.clients,
        "root.crt": trust.roots,
        CRL_FILE: sign_lists(trust.site_issuers, revoked, now),
        "coordinator.pub": encode_public(coordinator.public_key()),
        **sign_roster(roster, coordinator),
    }
    write_folder(out / "superlink", files, versioned=True)
    return (
        f"superlink: {out / 'superlink'}, {', '.join(list_names(leaf))}, "
        f"until {name_day(leaf.not_valid_after_utc)}"
    )


def make_coordinator(out: Path) -> str:
    """Make the key that signs instructions and the roster.

    Raises:
        CertificateError: the folder cannot be written.
    """
    key = ed25519.Ed25519PrivateKey.generate()
    write_folder(out / "coordinator", {"signing.key": encode_key(key)})
    return f"coordinator: {out / 'coordinator'}, signing key"


def make_evaluator(out: Path, coordinator: ed25519.Ed25519PublicKey) -> str:
    """Make the key that signs central evaluations, beside the key that checks instructions.

    Raises:
        CertificateError: the folder cannot be written.
    """
    files = {
        "signing.key": encode_key(ed25519.Ed25519PrivateKey.generate()),
        "coordinator.pub": encode_public(coordinator),
    }
    write_folder(out / "evaluator", files)
    return f"evaluator: {out / 'evaluator'}, signing key"


def make_site(
    out: Path,
    site: str,
    trust: Trust,
    coordinator: ed25519.Ed25519PublicKey,
    now: datetime.datetime,
) -> str:
    """Make a site's three keys, its TLS certificate and what it trusts.

    `ca.crt` is what it trusts in the SuperLink, the root; `coordinator.pub` is the key that
    instructions must be signed with.

    Raises:
        CertificateError: the folder cannot be written.
    """
    client = ec.generate_private_key(ec.SECP256R1())
    # Flower makes its own SuperNode keys on P-384; OpenSSH is the format that it reads.
    supernode = ec.generate_private_key(ec.SECP384R1())
    leaf = issue_site(trust.issuing.sites, client.public_key(), site, now)
    files = {
        "client.key": encode_key(client),
        "client.crt": trust.chain(leaf),
        "ca.crt": trust.roots,
        "signing.key": encode_key(ed25519.Ed25519PrivateKey.generate()),
        "supernode.key": supernode.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        ),
        "supernode.pub": encode_supernode(supernode.public_key()).encode("ascii") + b"\n",
        "coordinator.pub": encode_public(coordinator),
    }
    write_folder(out / "sites" / site, files, versioned=True)
    return (
        f"site {site}: {out / 'sites' / site}, keys for TLS, SuperNode and signing, "
        f"until {name_day(leaf.not_valid_after_utc)}"
    )


def digest_leaf(chain: bytes) -> str:
    """Return the TLS key of a chain's leaf as the roster carries it.

    Raises:
        CertificateError: there is no certificate for such a key.
    """
    try:
        key = x509.load_pem_x509_certificate(chain).public_key()
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CertificateError(
            "A site's client.crt holds no certificate of an elliptic-curve key; restore its folder."
        )
    return encode_tls(key)


def name_day(moment: datetime.datetime) -> str:
    """Return the day of a moment as people read it in a listing, in UTC."""
    return moment.astimezone(datetime.UTC).date().isoformat()
