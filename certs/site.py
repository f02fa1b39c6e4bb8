"""All keys of a federation: for the centre and for each site, what is missing is made.

What exists is never replaced, and nothing is built on an earlier set that is not whole.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from certs.authority import make_authority, read_authority
from certs.files import (
    CURRENT,
    CertificateError,
    MisuseError,
    read_certificates,
    read_file,
    read_signing_key,
)
from certs.names import LOCAL_HOSTS, check_sites, list_names, read_host
from certs.parties import (
    list_sites,
    make_coordinator,
    make_evaluator,
    make_site,
    make_superlink,
    name_day,
    read_site_keys,
)
from certs.roster import (
    ROSTER_FILE,
    Roster,
    compare_rosters,
    encode_signing,
    read_roster,
    write_roster,
)


def make_all(
    out: Path,
    sites: Sequence[str],
    hosts: Sequence[str] = (),
    *,
    now: datetime.datetime | None = None,
) -> list[str]:
    """Make whatever a federation lacks and return one line for each thing made.

    Args:
        out: the folder of all parties; made if missing.
        sites: names of the sites; those that exist already stay as they are.
        hosts: DNS names and IP addresses of the SuperLink, besides the local ones.
        now: when validity starts, with a time zone; the present time if None.

    Returns:
        What was made, where and until when; empty if there was nothing to do.

    Raises:
        MisuseError: a name cannot be used, or the SuperLink's certificate lacks a host.
        CertificateError: something made before is missing, altered or unreadable. In both cases
            nothing was written. A disk that fails half-way leaves whole folders only, and the
            next call goes on from there.
    """
    now = datetime.datetime.now(datetime.UTC) if now is None else now
    hosts = list(dict.fromkeys([*LOCAL_HOSTS, *(read_host(host) for host in hosts)]))
    check_sites(sites)
    _check_remains(out)
    _check_hosts(out, hosts)
    made = []
    if not (out / "authority").exists():
        authority = make_authority(out / "authority", now)
        made.append(
            f"authority: {out / 'authority'}, root until "
            f"{name_day(authority.root.not_valid_after_utc)}, issuing authorities until "
            f"{name_day(authority.sites.certificate.not_valid_after_utc)}"
        )
    authority = read_authority(out / "authority")
    if not (out / "superlink").exists():
        made.append(make_superlink(out, authority, hosts, now))
    if not (out / "coordinator").exists():
        made.append(make_coordinator(out))
    coordinator = read_signing_key(out / "coordinator" / "signing.key")
    if not (out / "evaluator").exists():
        made.append(make_evaluator(out, coordinator.public_key()))
    for site in sites:
        if not (out / "sites" / site).exists():
            made.append(make_site(out, site, authority, coordinator.public_key(), now))
    roster = collect_roster(out)
    if not _is_signed(out, roster):
        write_roster(out / "coordinator", roster, coordinator)
        made.append(
            f"roster: {out / 'coordinator' / ROSTER_FILE}, signed, "
            f"sites {', '.join(sorted(roster.sites))}"
        )
    return made


def collect_roster(out: Path) -> Roster:
    """Return the roster that the key files in `out` add up to.

    Raises:
        CertificateError: a key is missing or cannot be read.
    """
    return Roster(
        coordinator=_read_signing(out / "coordinator"),
        evaluator=_read_signing(out / "evaluator"),
        sites={site: read_site_keys(out / "sites" / site / CURRENT) for site in list_sites(out)},
    )


def _is_signed(out: Path, roster: Roster) -> bool:
    """Tell whether exactly this roster lies in `out` with a good signature."""
    coordinator = read_signing_key(out / "coordinator" / "signing.key").public_key()
    try:
        return read_roster(out / "coordinator", coordinator) == roster
    except CertificateError:
        return False


def _check_remains(out: Path) -> None:
    """Refuse to build on an earlier set of keys of which a part is gone or altered."""
    sites = [f"sites/{site}" for site in list_sites(out)]
    roster = f"coordinator/{ROSTER_FILE}"
    for party, dependants in (
        ("authority", ["superlink", *sites]),
        ("coordinator", ["evaluator", *sites]),
        ("evaluator", [roster]),
    ):
        left = [name for name in dependants if (out / name).exists()]
        if left and not (out / party).exists():
            raise CertificateError(
                f"{out / party} is missing but {out / left[0]} depends on it; "
                f"restore it, or remove {out} to start again."
            )
    if not (out / roster).exists():
        return
    found = collect_roster(out)
    # An interruption between the roster and its signature leaves this. The signature is made
    # again: it says nothing that the key files do not say.
    if read_file(out / roster) == found.encode():
        return
    signer = read_signing_key(out / "coordinator" / "signing.key").public_key()
    differences = compare_rosters(read_roster(out / "coordinator", signer), found)
    if differences:
        raise CertificateError(
            f"In {out}, {differences[0]}; restore the folder, or remove {out} to start again."
        )


def _check_hosts(out: Path, hosts: Sequence[str]) -> None:
    """Refuse hosts that the SuperLink's existing certificate does not cover."""
    if not (out / "superlink").exists():
        return
    path = out / "superlink" / CURRENT / "server.crt"
    names = list_names(read_certificates(path)[0])
    for host in hosts:
        if host not in names:
            raise MisuseError(
                f"{path} is not valid for {host}; "
                f"remove {out / 'superlink'} and run the command again."
            )


def _read_signing(folder: Path) -> str:
    return encode_signing(read_signing_key(folder / "signing.key").public_key())
