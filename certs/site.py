"""All keys of a federation: for the centre and for each site, what is missing is made.

What exists is never replaced, and nothing is built on an earlier set that is not whole.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from certs.authority import make_authority
from certs.change import apply_change
from certs.crl import CRL_FILE, name_end, read_lists
from certs.files import (
    CURRENT,
    CertificateError,
    MisuseError,
    encode_public,
    read_certificates,
    read_file,
    read_signing_key,
    unwritable,
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
from certs.renewal import read_federation
from certs.reply import publishing
from certs.revocation import read_records
from certs.roster import (
    ROSTER_FILE,
    SIGNATURE_FILE,
    Roster,
    compare_rosters,
    encode_signing,
    read_roster,
    write_roster,
)
from certs.trust import read_trust
from certs.validity import is_due


def make_all(
    out: Path,
    sites: Sequence[str],
    hosts: Sequence[str] = (),
    *,
    now: datetime.datetime | None = None,
    passphrase: bytes | None = None,
) -> list[str]:
    """Make whatever a federation lacks and return one line for each thing made.

    Args:
        out: the folder of all parties; made if missing.
        sites: names of the sites; those that exist already stay as they are, also revoked ones.
        hosts: DNS names and IP addresses of the SuperLink, besides the local ones.
        now: when validity starts, with a time zone; the present time if None.
        passphrase: encrypts a new root's key; None leaves it open, for development only.

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
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from error
    with publishing(out) as finished:
        made = [] if finished is None else [f"{finished.action}: carried to its end"]
        _check_remains(out)
        _check_hosts(out, hosts)
        return made + _make_missing(out, sites, hosts, now, passphrase)


def _make_missing(
    out: Path,
    sites: Sequence[str],
    hosts: Sequence[str],
    now: datetime.datetime,
    passphrase: bytes | None,
) -> list[str]:
    """Make each party in turn, then the roster, then what the SuperLink knows of all of them."""
    made = []
    if not (out / "authority").exists():
        authority = make_authority(out / "authority", now, passphrase=passphrase)
        made.append(
            f"authority: {out / 'authority'}, root until "
            f"{name_day(authority.root.not_valid_after_utc)}, issuing authorities until "
            f"{name_day(authority.sites.certificate.not_valid_after_utc)}"
        )
    trust = read_trust(out)
    if not (out / "coordinator").exists():
        made.append(make_coordinator(out))
    coordinator = read_signing_key(out / "coordinator" / "signing.key")
    if not (out / "evaluator").exists():
        made.append(make_evaluator(out, coordinator.public_key()))
    for site in sites:
        if not (out / "sites" / site).exists():
            made.append(make_site(out, site, trust, coordinator.public_key(), now))
    signed = _read_signed(out)
    roster = collect_roster(out).follow(signed)
    line = (
        f"roster: {out / 'coordinator' / ROSTER_FILE}, signed, "
        f"sites {', '.join(sorted(roster.sites))}"
    )
    if roster != signed:
        made.append(line)
    centre = out / "superlink"
    # Later rosters become the coordinator's in the same step as the SuperLink's.
    if signed is None or (roster != signed and not centre.exists()):
        write_roster(out / "coordinator", roster, coordinator)
    if not centre.exists():
        records = read_records(out)
        made.append(make_superlink(out, trust, hosts, coordinator, roster, records, now))
    elif not _is_informed(out, now) or (signed is not None and roster != signed):
        files = read_federation(out, now).renew_superlink(roster)
        version = apply_change(out, "make", files).versions["superlink"]
        made.append(f"superlink: {centre / version}, roster and revocation list")
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


def _read_signed(out: Path) -> Roster | None:
    """Return the roster with a good signature that lies in `out`, or None."""
    coordinator = read_signing_key(out / "coordinator" / "signing.key").public_key()
    try:
        return read_roster(out / "coordinator", coordinator)
    except CertificateError:
        return None


def _is_informed(out: Path, now: datetime.datetime) -> bool:
    """Tell whether the SuperLink has the coordinator's roster and a fresh revocation list."""
    folder, coordinator = out / "superlink" / CURRENT, out / "coordinator"
    signer = read_signing_key(coordinator / "signing.key").public_key()
    expected = {name: read_file(coordinator / name) for name in (ROSTER_FILE, SIGNATURE_FILE)}
    expected["coordinator.pub"] = encode_public(signer)
    if not (folder / CRL_FILE).exists():
        return False
    for name, content in expected.items():
        if not (folder / name).exists() or read_file(folder / name) != content:
            return False
    issuers = [one.certificate for one in read_trust(out).site_issuers]
    return not any(
        is_due(one.last_update_utc, name_end(one), now)
        for one in read_lists(folder / CRL_FILE, issuers)
    )


def _check_remains(out: Path) -> None:
    """Refuse to build on an earlier set of keys of which a part is gone or altered."""
    sites = [f"sites/{site}" for site in list_sites(out, revoked=True)]
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
                f"{path} is not valid for {host}; run `python -m certs rotate --superlink "
                f"--host {host} --out {out}` first."
            )


def _read_signing(folder: Path) -> str:
    return encode_signing(read_signing_key(folder / "signing.key").public_key())
