"""Rotation: new TLS keys and certificates for the SuperLink and sites, while they are at work.

The SuperLink's new version comes first: its roster accepts each site's new key beside the one
that the site still presents. Only then do the sites' folders change.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509

from certs.change import Record, apply_change
from certs.files import CURRENT, MisuseError, read_certificates
from certs.names import read_host
from certs.parties import digest_leaf, list_enrolled, list_sites, name_day
from certs.renewal import (
    Federation,
    format_serial,
    list_leaves,
    read_federation,
)
from certs.reply import publishing
from certs.trust import Trust


@dataclass(frozen=True, kw_only=True)
class Rotated:
    """One certificate that was replaced."""

    name: str
    """`superlink` or `sites/<name>`."""
    old_serial: str
    """Serial number before, in hex."""
    new_serial: str
    """Serial number now, in hex."""
    until: str
    """Day on which the new certificate ends."""


def rotate(
    out: Path,
    sites: Sequence[str] | None = None,
    *,
    superlink: bool = True,
    hosts: Sequence[str] = (),
    now: datetime.datetime | None = None,
) -> list[Rotated]:
    """Give the SuperLink and sites new keys and certificates, all of them or none.

    SuperNode and signing keys stay. Sites that keep their own keys are passed by: they send a
    request to renew. A rotation that was interrupted is carried out first, and
    what it replaced is reported but not replaced again.

    Args:
        out: the folder of all parties.
        sites: names of the sites; all whose keys are here if None.
        superlink: whether the SuperLink gets a new certificate too.
        hosts: names for the SuperLink's certificate, besides those that it has.
        now: when validity starts, with a time zone; the present time if None.

    Raises:
        MisuseError: a site is unknown, revoked or keeps its own keys, or a host cannot be one.
        CertificateError: a file is missing or altered, or the disk failed.
    """
    now = datetime.datetime.now(datetime.UTC) if now is None else now
    hosts = [read_host(host) for host in hosts]
    with publishing(out) as finished:
        admitted, enrolled = list_sites(out), list_enrolled(out)
        kept_here = [site for site in admitted if site not in enrolled]
        wanted = kept_here if sites is None else list(dict.fromkeys(sites))
        for site in wanted:
            if site not in admitted:
                raise MisuseError(
                    f"Site {site!r} is not among the sites in {out} ({', '.join(admitted)}); "
                    "correct --sites."
                )
            if site in enrolled:
                raise MisuseError(
                    f"Site {site} keeps its own keys; it renews them by `certs request --renew` "
                    "there."
                )
        done = finished.serials if finished and finished.action == "rotate" else {}
        wanted = [site for site in wanted if f"sites/{site}" not in done]
        superlink = superlink and "superlink" not in done
        rotated = describe(out, finished) if finished and done else []
        if not wanted and not superlink:
            return rotated
        record = replace_leaves(
            read_federation(out, now), "rotate", wanted, superlink=superlink, hosts=hosts
        )
        return rotated + describe(out, record)


def replace_leaves(
    federation: Federation,
    action: str,
    sites: Sequence[str],
    *,
    superlink: bool,
    hosts: Sequence[str] = (),
    trust: Trust | None = None,
    renewed: Mapping[str, dict[str, bytes]] | None = None,
) -> Record:
    """Issue new leaves and put them in use; returns what was changed.

    `renewed` holds the next files of sites that have sent a key of their own.

    Each site's leaves before its present one go on the revocation list: their keys leave the
    roster in the same step.

    Raises:
        CertificateError: a file is missing or altered, or the disk failed.
    """
    out = federation.out
    roster, superseded, serials, new_sites = federation.roster, {}, {}, {}
    for site in sites:
        folder = out / "sites" / site
        present = read_certificates(folder / CURRENT / "client.crt")[0]
        files = (renewed or {}).get(site) or federation.renew_site(site, trust=trust, leaf=True)
        keys = federation.find_keys(site).rotate(digest_leaf(files["client.crt"]))
        roster = replace(roster, sites={**roster.sites, site: keys})
        superseded.update(
            {
                leaf.serial_number: federation.now
                for leaf in list_leaves(folder)
                if leaf != present and leaf.serial_number not in federation.revoked
            }
        )
        serials[f"sites/{site}"] = (format_serial(present), _serial(files["client.crt"]))
        new_sites[site] = files
    centre = federation.renew_superlink(
        roster, trust=trust, revoked=superseded, leaf=superlink, hosts=hosts
    )
    if superlink:
        present = read_certificates(out / "superlink" / CURRENT / "server.crt")[0]
        serials["superlink"] = (format_serial(present), _serial(centre["server.crt"]))
    return apply_change(out, action, centre, new_sites, serials=serials)


def describe(out: Path, record: Record) -> list[Rotated]:
    """Return a line for each certificate that a change replaced, the SuperLink's first."""
    rotated = []
    for name, (old, new) in sorted(record.serials.items(), key=lambda one: one[0] != "superlink"):
        file = "server.crt" if name == "superlink" else "client.crt"
        leaf = read_certificates(out / name / CURRENT / file)[0]
        rotated.append(
            Rotated(
                name=name, old_serial=old, new_serial=new, until=name_day(leaf.not_valid_after_utc)
            )
        )
    return rotated


def _serial(chain: bytes) -> str:
    return format_serial(x509.load_pem_x509_certificate(chain))
