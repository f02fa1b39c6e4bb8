"""Rollover of the authority in three stages, between which everybody keeps connecting.

    trust    a new root and issuing authorities stand beside the old ones; everybody trusts both
    switch   leaves come from the new ones; who knows only the old root is led there by a
             certificate of the new root that the old one signed
    retire   the old ones are removed

The stage is read off the files: which authorities there are, who trusts them, and which of them
issued the SuperLink's certificate. The old root's key is needed for `trust` alone.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from certs.authority import make_authority, read_root
from certs.chain import is_issued_by
from certs.change import NEXT_AUTHORITY, apply_change
from certs.files import CURRENT, CertificateError, MisuseError, read_certificates
from certs.parties import digest_leaf, list_enrolled, list_sites
from certs.renewal import Federation, read_federation
from certs.reply import name_reply, publishing
from certs.rotation import Rotated, describe, replace_leaves
from certs.trust import Trust

STAGES = ("trust", "switch", "retire")
_AFTER = {
    "trust": "hand every site its new folder, then run the same command again for `switch`",
    "switch": "hand every site its new folder, then run the same command again for `retire`",
    "retire": "the rollover is complete; destroy the old root's key where it is kept",
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of the rollover that was done."""

    name: str
    """One of `STAGES`."""
    rotated: Sequence[Rotated]
    """The certificates that it replaced."""
    following: str
    """What comes next, in words."""


def roll_over(
    out: Path,
    *,
    force: bool = False,
    accepted: Sequence[str] = (),
    passphrase: bytes | None = None,
    now: datetime.datetime | None = None,
) -> Stage:
    """Do the next stage of the rollover; one that was interrupted is carried out, and is it.

    Args:
        out: the folder of all parties.
        force: retire the old authorities although a site has not got the new ones.
        accepted: sites with keys of their own that have accepted their reply since `switch`.
        passphrase: opens the old root's key, if it has one, and encrypts the new one's.
        now: when new validity starts, with a time zone; the present time if None.

    Raises:
        MisuseError: the old root's key needs a passphrase, or another one; or a site that has
            accepted is not one that keeps its own keys.
        CertificateError: the root's key is elsewhere, a site lacks the new authorities, a file is
            missing or altered, or the disk failed.
    """
    now = datetime.datetime.now(datetime.UTC) if now is None else now
    for site in accepted:
        if site not in list_enrolled(out):
            raise MisuseError(f"Site {site!r} keeps no keys of its own; correct --accepted.")
    with publishing(out) as finished:
        if finished is not None and finished.action in STAGES:
            return _done(finished.action, describe(out, finished))
        stage = read_stage(out)
        if stage == "trust":
            _trust(out, passphrase, now)
            return _done(stage, [])
        federation = read_federation(out, now)
        if stage == "switch":
            return _done(stage, _switch(federation))
        _retire(federation, force=force, accepted=accepted)
        return _done(stage, [])


def read_stage(out: Path) -> str:
    """Return the stage that comes next.

    Raises:
        CertificateError: a file is missing or cannot be read.
    """
    if not (out / NEXT_AUTHORITY).exists():
        return "trust"
    root = read_certificates(out / NEXT_AUTHORITY / "ca.crt")[0]
    issuer = read_certificates(out / NEXT_AUTHORITY / "server.crt")[0]
    leaf = read_certificates(out / "superlink" / CURRENT / "server.crt")[0]
    if is_issued_by(leaf, issuer):
        return "retire"
    bundles = [out / "superlink" / CURRENT / "root.crt"]
    bundles += [out / "sites" / site / CURRENT / "ca.crt" for site in list_sites(out)]
    return "switch" if all(root in read_certificates(path) for path in bundles) else "trust"


def _trust(out: Path, passphrase: bytes | None, now: datetime.datetime) -> None:
    """Make the new authorities, then have everybody trust them beside the old ones."""
    if not (out / NEXT_AUTHORITY).exists():
        # All that could refuse is read before anything is written.
        read_federation(out, now)
        previous = read_root(out / "authority", passphrase)
        make_authority(out / NEXT_AUTHORITY, now, passphrase=passphrase, previous=previous)
    federation = read_federation(out, now)
    apply_change(
        out,
        "trust",
        federation.renew_superlink(federation.roster),
        {site: federation.renew_site(site) for site in list_sites(out)},
    )


def _switch(federation: Federation) -> list[Rotated]:
    """Replace every leaf by one of the new authorities."""
    trust = replace(federation.trust, issuing=federation.trust.authorities[-1])
    record = replace_leaves(
        federation, "switch", list_sites(federation.out), superlink=True, trust=trust
    )
    return describe(federation.out, record)


def _retire(federation: Federation, *, force: bool, accepted: Sequence[str]) -> None:
    """Remove the old authorities from what everybody trusts, and then altogether."""
    out = federation.out
    following = federation.trust.authorities[-1]
    behind = [site for site in list_sites(out) if not _has_moved(out, site, federation.trust)]
    if behind and not force:
        raise CertificateError(
            f"Site {behind[0]} does not trust the new root or has a certificate of the old "
            f"authority ({out / 'sites' / behind[0] / CURRENT}); hand it its new folder, or cut it "
            "off with --force."
        )
    for site in list_enrolled(out):
        # Their folder here shows what was sent, not what they use.
        if site not in accepted and not force:
            raise CertificateError(
                f"Site {site} keeps its own keys: once it has accepted {name_reply(out, site)}, "
                f"say so with --accepted {site}, or cut it off with --force."
            )
    alone = replace(following, cross=None)
    trust = Trust((alone,), alone)
    roster, new_sites = federation.roster, {}
    for site in list_sites(out):
        files = federation.renew_site(site, trust=trust, leaf=site in behind)
        keys = federation.find_keys(site).rotate(digest_leaf(files["client.crt"]))
        roster = replace(roster, sites={**roster.sites, site: keys})
        new_sites[site] = files
    centre = federation.renew_superlink(roster, trust=trust)
    apply_change(out, "retire", centre, new_sites, promote=True)


def _has_moved(out: Path, site: str, trust: Trust) -> bool:
    """Tell whether a site's folder has the new root and a leaf of the new authority."""
    folder, following = out / "sites" / site / CURRENT, trust.authorities[-1]
    leaf = read_certificates(folder / "client.crt")[0]
    return following.root in read_certificates(folder / "ca.crt") and is_issued_by(
        leaf, following.sites.certificate
    )


def _done(name: str, rotated: Sequence[Rotated]) -> Stage:
    return Stage(name=name, rotated=rotated, following=_AFTER[name])
