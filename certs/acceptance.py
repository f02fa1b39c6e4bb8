"""A site's acceptance of the coordinator's reply: checked against its own keys, then put in use.

Guarantees, each restated by a test in tests/certs/test_acceptance.py:

- The reply answers this site's own request, is signed with the coordinator's key that the site
  was given before, and is not older than what the site has.
- Its certificate is for the site's own TLS key and name, and comes from a root in the reply.
- It never replaces all roots that the site trusts: one at least stays.
- Both folders are complete versions at any time; a refused reply changes nothing.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from certs.application import PENDING, SUPERNODE, TRAINER, sweep_home
from certs.bundle import read_bounded
from certs.chain import accept_client
from certs.files import (
    CURRENT,
    CertificateError,
    MisuseError,
    read_certificates,
    read_file,
    read_public_key,
    read_tls_key,
    unwritable,
)
from certs.fingerprint import name_signing
from certs.parties import REQUEST_FILE, name_day
from certs.reply import LIMIT_BYTES, Reply, decode_reply, read_leaf
from certs.request import Request, decode_request
from certs.roster import ROSTER_FILE, SIGNATURE_FILE, Roster, decode_roster
from certs.versions import prune_versions, read_version, stage_version, switch_version

_REPLY_FILE = "reply.json"


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A reply that is in use."""

    site: str
    """The site's name."""
    supernode: Path
    """Folder of the keys of the connection."""
    trainer: Path
    """Folder of the signing key and of whose signatures it trusts."""
    until: str
    """Day on which the certificate ends."""
    peers: Mapping[str, str]
    """Fingerprint of each other site's signing key, for `peers` in the policy."""
    anew: bool
    """Whether this call changed anything."""


@dataclass(frozen=True)
class _Own:
    """Keys of a request, waiting or granted, and whom the site trusts with them."""

    connection: Path
    """Folder of `client.key`, `supernode.key`, `ca.crt` and the request."""
    trainer: Path
    """Folder of `signing.key` and `coordinator.pub`."""
    request: Request


def accept_reply(out: Path, path: Path, *, now: datetime.datetime | None = None) -> Accepted:
    """Check a reply and put it in use.

    Args:
        out: the site's folder, in which the request was made.
        path: the reply, which may come from anybody.
        now: the moment to check for, with a time zone; the present time if None.

    Raises:
        MisuseError: no request was made here.
        CertificateError: the reply is refused, or a file cannot be read or written.
    """
    now = datetime.datetime.now(datetime.UTC) if now is None else now
    sweep_home(out)
    owned = _list_owned(out)
    if not owned:
        raise MisuseError(f"{out} holds no request; make it with `certs request` first.")
    coordinator = read_public_key(owned[0].trainer / "coordinator.pub")
    reply = decode_reply(read_bounded(path, LIMIT_BYTES), coordinator, str(path))
    own = next((one for one in owned if one.request.digest == reply.request), None)
    if own is None or reply.site != own.request.site:
        raise CertificateError(
            f"{path} does not answer the request of this site ({out}); name the right reply, or "
            "send the request again."
        )
    leaf = _check_chain(own, reply, str(path), now)
    roster = decode_roster(
        reply.files[ROSTER_FILE], reply.files[SIGNATURE_FILE], coordinator, str(path)
    )
    listed = roster.sites.get(own.request.site)
    signing, supernode = own.request.keys.signing, own.request.keys.supernode
    if (
        listed is None
        or (listed.signing, listed.supernode) != (signing, supernode)
        or own.request.keys.tls[0] not in listed.tls
    ):
        raise CertificateError(
            f"The roster in {path} has other keys for site {own.request.site} than those made "
            "here; ask the coordinator."
        )
    _check_number(out, reply, str(path))
    return Accepted(
        site=own.request.site,
        supernode=out / SUPERNODE,
        trainer=out / TRAINER,
        until=name_day(leaf.not_valid_after_utc),
        peers=list_peers(roster, own.request.site),
        anew=_install(out, own, reply),
    )


def list_peers(roster: Roster, site: str) -> dict[str, str]:
    """Return the fingerprints of all other sites' signing keys, by name."""
    return {
        name: name_signing(keys.signing)
        for name, keys in sorted(roster.sites.items())
        if name != site
    }


def _list_owned(out: Path) -> list[_Own]:
    """The request that waits, then the one that was granted."""
    places = [
        (out / PENDING, out / PENDING),
        (out / SUPERNODE / CURRENT, out / TRAINER / CURRENT),
    ]
    owned = []
    for connection, trainer in places:
        path = connection / REQUEST_FILE
        if path.exists() and trainer.exists():
            request = decode_request(read_file(path), str(path))
            owned.append(_Own(connection, trainer, request))
    return owned


def _check_chain(own: _Own, reply: Reply, where: str, now: datetime.datetime) -> x509.Certificate:
    """Return the certificate in the reply, for this site's key and from a root that it keeps."""
    chain = read_leaf(reply.files["client.crt"], where)
    roots = read_leaf(reply.files["ca.crt"], where)
    trusted = read_certificates(own.connection / "ca.crt")
    if not any(root in trusted for root in roots):
        raise CertificateError(
            f"{where} replaces every root that this site trusts; ask the coordinator for the reply "
            "of the stage before, or compare the new root out of band and enrol anew."
        )
    key = read_tls_key(own.connection / "client.key")
    if chain[0].public_key() != key.public_key():
        raise CertificateError(
            f"The certificate in {where} is not for this site's TLS key; ask for a new reply."
        )
    if not accept_client(chain, roots, own.request.site, now):
        raise CertificateError(
            f"The certificate in {where} is not valid now for site {own.request.site} below its "
            "root; check this machine's clock, then ask for a new reply."
        )
    return chain[0]


def _check_number(out: Path, reply: Reply, where: str) -> None:
    """Refuse a reply that is older than the one in use."""
    path = out / SUPERNODE / CURRENT / _REPLY_FILE
    if not path.exists():
        return
    try:
        number = int(json.loads(read_file(path))["number"])
    except (ValueError, KeyError, TypeError) as error:
        raise CertificateError(f"{path} is not a reply's manifest; restore it.") from error
    if reply.number < number:
        raise CertificateError(
            f"{where} is older than the reply that this site has accepted; ask for the latest one."
        )


def _install(out: Path, own: _Own, reply: Reply) -> bool:
    """Put the reply in use: the trainer's folder, then the connection's; tells if any changed."""
    trainer = {
        "signing.key": read_file(own.trainer / "signing.key"),
        "coordinator.pub": reply.files["coordinator.pub"],
        ROSTER_FILE: reply.files[ROSTER_FILE],
        SIGNATURE_FILE: reply.files[SIGNATURE_FILE],
    }
    connection = {
        **{name: read_file(own.connection / name) for name in ("client.key", "supernode.key")},
        "supernode.pub": read_file(own.connection / "supernode.pub"),
        "client.crt": reply.files["client.crt"],
        "ca.crt": reply.files["ca.crt"],
        REQUEST_FILE: own.request.content,
        _REPLY_FILE: reply.manifest,
    }
    # Signing and SuperNode key are the same in every version, so that each folder goes with
    # either version of the other.
    staged = {}
    for name, files in ((TRAINER, trainer), (SUPERNODE, connection)):
        folder = out / name
        if not (folder / CURRENT).exists() or read_version(folder) != files:
            staged[name] = stage_version(folder, files)
    for name, version in staged.items():
        switch_version(out / name, version)
        prune_versions(out / name)
    waiting = out / PENDING
    if waiting.exists() and own.connection == waiting:
        try:
            # Renamed first: what is half removed is no request.
            hidden = out / f".{PENDING}.old"
            waiting.rename(hidden)
            shutil.rmtree(hidden)
        except OSError as error:
            raise unwritable(waiting, error) from error
    return bool(staged)
