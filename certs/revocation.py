"""Revocation: a site that may not come any more, now or after a rollover.

Its certificates' serials go on the list, its keys leave the roster, and `revoked.json` in its
folder keeps both from coming back: `make` and `rotate` pass such a folder by.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, replace
from pathlib import Path

from certs.change import REVOKED_FILE, apply_change
from certs.files import CertificateError, MisuseError, read_file
from certs.parties import list_sites
from certs.renewal import format_serial, list_leaves, read_federation
from certs.reply import publishing


@dataclass(frozen=True, kw_only=True)
class Revocation:
    """What was revoked."""

    site: str
    """Name of the site."""
    serials: list[str]
    """Serial numbers of its certificates, in hex, the present one last."""
    moment: str
    """When, in UTC."""
    anew: bool
    """Whether this call did it; False if it was done before."""


def revoke(out: Path, site: str, *, now: datetime.datetime | None = None) -> Revocation:
    """Put a site's certificates on the revocation list and take it off the roster.

    Args:
        out: the folder of all parties.
        site: name of the site.
        now: the moment, with a time zone; the present time if None.

    Raises:
        MisuseError: there is no such site.
        CertificateError: a file is missing or altered, or the disk failed.
    """
    now = datetime.datetime.now(datetime.UTC) if now is None else now
    folder = out / "sites" / site
    with publishing(out) as finished:
        if site not in list_sites(out, revoked=True):
            raise MisuseError(
                f"Site {site!r} is not among the sites in {out} ({', '.join(list_sites(out))}); "
                "correct --site."
            )
        if (folder / REVOKED_FILE).exists():
            anew = finished is not None and site in finished.revoked
            return _read_revocation(folder, anew=anew)
        federation = read_federation(out, now)
        serials = [format_serial(leaf) for leaf in list_leaves(folder)]
        roster = replace(
            federation.roster,
            sites={name: keys for name, keys in federation.roster.sites.items() if name != site},
        )
        apply_change(
            out,
            "revoke",
            federation.renew_superlink(
                roster, revoked={int(serial, 16): now for serial in serials}
            ),
            revoked={site: {"moment": now.isoformat(timespec="seconds"), "serials": serials}},
        )
        return _read_revocation(folder, anew=True)


def read_records(out: Path) -> dict[int, datetime.datetime]:
    """Return when each serial of a revoked site was revoked, from the sites' folders alone.

    Raises:
        CertificateError: a record cannot be read.
    """
    records = {}
    for site in list_sites(out, revoked=True):
        folder = out / "sites" / site
        if (folder / REVOKED_FILE).exists():
            one = _read_revocation(folder, anew=False)
            moment = datetime.datetime.fromisoformat(one.moment)
            records.update({int(serial, 16): moment for serial in one.serials})
    return records


def _read_revocation(folder: Path, *, anew: bool) -> Revocation:
    path = folder / REVOKED_FILE
    try:
        fields = json.loads(read_file(path))
        datetime.datetime.fromisoformat(fields["moment"])
        return Revocation(
            site=folder.name,
            serials=[f"{int(serial, 16):X}".zfill(len(serial)) for serial in fields["serials"]],
            moment=fields["moment"],
            anew=anew,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CertificateError(
            f"{path} does not say what was revoked; revoke the site again after removing it."
        ) from error
