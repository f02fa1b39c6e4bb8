"""Admission of a site that keeps its own keys: a request is checked, and a certificate issued.

The coordinator's folder of such a site holds its certificate, its public keys and the request,
and no private key. A new site is admitted after two people have compared the fingerprint; a
request to renew is signed with the signing key that the roster knows, which says as much.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from certs.authority import issue_site
from certs.change import REVOKED_FILE, apply_change
from certs.files import (
    CURRENT,
    CertificateError,
    encode_public,
    read_certificates,
    read_file,
    read_public_key,
    read_signing_key,
)
from certs.parties import REQUEST_FILE, digest_leaf, is_enrolled, list_sites, name_day
from certs.renewal import Federation, format_serial, read_federation
from certs.reply import name_reply, publishing
from certs.request import (
    SIGNING_FILE,
    SUPERNODE_FILE,
    Request,
    digest_certificate,
    name_roots,
    read_request,
)
from certs.roster import encode_signing
from certs.rotation import replace_leaves
from certs.versions import list_versions


@dataclass(frozen=True, kw_only=True)
class Signed:
    """A request that was granted."""

    site: str
    """The site's name."""
    fingerprint: str
    """What both sides compare."""
    reply: Path
    """What the site gets."""
    serial: str
    """Serial number of its certificate, in hex."""
    until: str
    """Day on which the certificate ends."""
    renewal: bool
    """Whether the site was admitted before this request."""
    anew: bool
    """Whether this call did it; False if it was done before."""


def sign_request(
    out: Path,
    path: Path,
    confirm: Callable[[Request], None],
    *,
    now: datetime.datetime | None = None,
) -> Signed:
    """Check a request and, once it is confirmed, issue what it asks for, wholly or not at all.

    Args:
        out: the folder of all parties.
        path: the request, which may come from anybody.
        confirm: asked about a new site's request that has passed every check; raises to refuse.
        now: when validity starts, with a time zone; the present time if None.

    Raises:
        CertificateError: the request is refused, a file is missing or altered, or the disk failed.
    """
    now = datetime.datetime.now(datetime.UTC) if now is None else now
    request = read_request(path)
    with publishing(out) as finished:
        folder = out / "sites" / request.site
        federation = read_federation(out, now)
        _check_trust(federation, request, str(path))
        present = folder / CURRENT
        if is_enrolled(present) and read_file(present / REQUEST_FILE) == request.content:
            done = finished is not None and finished.action == "sign"
            return _describe(out, request, anew=done)
        if request.renews:
            _check_renewal(federation, request, str(path))
        else:
            _check_newcomer(federation, request, str(path))
        confirm(request)
        files = _make_files(federation, request)
        if request.renews:
            replace_leaves(
                federation, "sign", [request.site], superlink=False, renewed={request.site: files}
            )
        else:
            sites = {**federation.roster.sites, request.site: request.keys}
            roster = replace(federation.roster, sites=sites)
            apply_change(out, "sign", federation.renew_superlink(roster), {request.site: files})
    return _describe(out, request, anew=True)


def _check_trust(federation: Federation, request: Request, where: str) -> None:
    """Refuse a request whose site was given another coordinator or root than ours."""
    roots = name_roots([one.root for one in federation.trust.authorities])
    coordinator = encode_signing(federation.coordinator.public_key())
    if request.coordinator != coordinator or not set(request.roots) <= set(roots):
        raise CertificateError(
            f"{where} was made for another coordinator or root; give the site the present kit, or "
            "to a site that is admitted its latest reply."
        )
    if not request.roots:
        raise CertificateError(f"{where} names no root; ask the site for a new one.")


def _check_newcomer(federation: Federation, request: Request, where: str) -> None:
    """Refuse a name that is taken, and keys that anybody has or had."""
    out, site = federation.out, request.site
    if site in list_sites(out, revoked=True):
        revoked = (out / "sites" / site / REVOKED_FILE).exists()
        state = "was revoked" if revoked else "is admitted already"
        raise CertificateError(
            f"{where} is for site {site}, which {state}; let the site choose another name"
            + (", or renew with `certs request --renew`." if not revoked else ".")
        )
    _check_keys(federation, request, where)


def _check_renewal(federation: Federation, request: Request, where: str) -> None:
    """Refuse a renewal that is not by the site itself, for its present certificate."""
    site, folder = request.site, federation.out / "sites" / request.site
    if site not in federation.roster.sites or not is_enrolled(folder / CURRENT):
        raise CertificateError(
            f"{where} renews site {site}, which is not admitted with keys of its own; "
            "the site has to send a first request."
        )
    known = federation.roster.sites[site]
    if (request.keys.signing, request.keys.supernode) != (known.signing, known.supernode):
        raise CertificateError(
            f"{where} is not signed with the keys of site {site}; revoke the site if it lost them."
        )
    leaf = read_certificates(folder / CURRENT / "client.crt")[0]
    if request.renews != digest_certificate(leaf):
        raise CertificateError(
            f"{where} renews another certificate than the present one of site {site}; send it its "
            f"latest reply ({name_reply(federation.out, site)}), which it has to accept first."
        )
    _check_keys(federation, request, where, besides=site)


def _check_keys(
    federation: Federation, request: Request, where: str, besides: str | None = None
) -> None:
    """Refuse a key that somebody has or had, revoked sites included."""
    known = _list_known(federation)
    for key in (request.keys.signing, request.keys.supernode, *request.keys.tls):
        owner = known.get(key)
        # A site that renews keeps two of its keys, and must not come back to an old third.
        if owner is not None and (owner != besides or key in request.keys.tls):
            raise CertificateError(
                f"{where} reuses a key of {owner}; the site has to make keys of its own."
            )


def _list_known(federation: Federation) -> dict[str, str]:
    """Return whose each public key is or was, as far as folders and roster remember."""
    out, roster = federation.out, federation.roster
    known = {roster.coordinator: "the coordinator", roster.evaluator: "the evaluator"}
    for site in list_sites(out, revoked=True):
        for version in list_versions(out / "sites" / site):
            known.update(dict.fromkeys(_list_keys(out / "sites" / site / version), site))
    for site, keys in roster.sites.items():
        known.update(dict.fromkeys((keys.signing, keys.supernode, *keys.tls), site))
    return known


def _list_keys(folder: Path) -> list[str]:
    """The public keys in one version of a site's folder; what cannot be read is left out."""
    keys = []
    with suppress(CertificateError):
        keys.append(digest_leaf(read_file(folder / "client.crt")))
    with suppress(CertificateError, UnicodeDecodeError):
        keys.append(read_file(folder / SUPERNODE_FILE).decode("ascii").strip())
    with suppress(CertificateError):
        if (folder / SIGNING_FILE).exists():
            keys.append(encode_signing(read_public_key(folder / SIGNING_FILE)))
        else:
            keys.append(encode_signing(read_signing_key(folder / "signing.key").public_key()))
    return keys


def _make_files(federation: Federation, request: Request) -> dict[str, bytes]:
    """Return the next files of the site's folder: public ones only."""
    trust, signing = federation.trust, request.keys.signing
    leaf = issue_site(trust.issuing.sites, request.client, request.site, federation.now)
    return {
        "client.crt": trust.chain(leaf),
        "ca.crt": trust.roots,
        SUPERNODE_FILE: request.keys.supernode.encode("ascii") + b"\n",
        SIGNING_FILE: encode_public(Ed25519PublicKey.from_public_bytes(bytes.fromhex(signing))),
        "coordinator.pub": encode_public(federation.coordinator.public_key()),
        REQUEST_FILE: request.content,
    }


def _describe(out: Path, request: Request, *, anew: bool) -> Signed:
    leaf = read_certificates(out / "sites" / request.site / CURRENT / "client.crt")[0]
    return Signed(
        site=request.site,
        fingerprint=request.fingerprint,
        reply=name_reply(out, request.site),
        serial=format_serial(leaf),
        until=name_day(leaf.not_valid_after_utc),
        renewal=bool(request.renews),
        anew=anew,
    )
