"""A change to several parties' folders that happens to all of them or to none.

The new versions are written first, hidden. Then one small file, `.change.json`, lists them: from
that moment the change counts, and whoever finds the file carries it out to its end. Before that
moment nothing that anybody reads has changed, and what lies there hidden is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from certs.files import CertificateError, read_file, replace_file, sync_folder, unwritable
from certs.roster import ROSTER_FILE, SIGNATURE_FILE
from certs.versions import prune_versions, stage_version, sweep, switch_version

CHANGE_FILE = ".change.json"
REVOKED_FILE = "revoked.json"
NEXT_AUTHORITY = "authority-next"
REPLIES = "replies"
_SUPERLINK = "superlink"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What `.change.json` says: enough to carry a change out from any point on."""

    action: str
    """The command, such as `rotate`; the next call of the same command reports it."""
    versions: Mapping[str, str]
    """The version to put in use, by folder: `superlink`, then `sites/<name>`."""
    serials: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Old and new serial of each leaf that is replaced, in hex, by folder."""
    revoked: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """What `revoked.json` will hold, by name of the revoked site."""
    promote: bool = False
    """Whether the next authority takes the place of the present one."""


@contextmanager
def changing(out: Path) -> Iterator[Record | None]:
    """Hold the folder of all parties for one change, with nothing half done in it.

    Yields:
        The interrupted change that was carried out first, or None.

    Raises:
        CertificateError: another command is at work, or the folder cannot be written.
    """
    try:
        descriptor = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise CertificateError(
            f"{out} cannot be read ({error.strerror}); make the keys first."
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CertificateError(
                f"{out} cannot be locked ({error.strerror}); wait for the command that changes it."
            ) from error
        yield _recover(out)
    finally:
        os.close(descriptor)


def apply_change(
    out: Path,
    action: str,
    superlink: Mapping[str, bytes],
    sites: Mapping[str, Mapping[str, bytes]] | None = None,
    *,
    serials: Mapping[str, tuple[str, str]] | None = None,
    revoked: Mapping[str, Mapping[str, object]] | None = None,
    promote: bool = False,
) -> Record:
    """Put new versions in use: the SuperLink's first, which has to know what the sites present.

    The roster in the SuperLink's new version becomes the coordinator's.

    Raises:
        CertificateError: the disk failed; the next command carries the change out or drops it.
    """
    staged = {
        _SUPERLINK: superlink,
        **{f"sites/{site}": new for site, new in (sites or {}).items()},
    }
    record = Record(
        action=action,
        versions={name: stage_version(out / name, files) for name, files in staged.items()},
        serials=serials or {},
        revoked=revoked or {},
        promote=promote,
    )
    replace_file(out / CHANGE_FILE, json.dumps(asdict(record), indent=2).encode())
    _carry_out(out, record)
    return record


def _recover(out: Path) -> Record | None:
    """Carry out a change that counts, drop one that does not."""
    record = None
    if (out / CHANGE_FILE).exists():
        record = _read_record(out / CHANGE_FILE)
        _carry_out(out, record)
    # What is left hidden was never used: nobody will miss it.
    for party in ("authority", "coordinator", "evaluator", _SUPERLINK, CHANGE_FILE):
        sweep(out, f".{party}")
    for folder in (out / "sites", out / "coordinator", out / _SUPERLINK, out / REPLIES):
        sweep(folder)
    if (out / "sites").is_dir():
        for site in (out / "sites").iterdir():
            sweep(site)
    return record


def _read_record(path: Path) -> Record:
    try:
        record = Record(**json.loads(read_file(path)))
        # Both tables are looked at below; a mere text would only fail half-way.
        dict(record.versions), dict(record.revoked)
    except (ValueError, TypeError) as error:
        raise CertificateError(
            f"{path} does not hold a change; restore the folder from a backup."
        ) from error
    return record


def _carry_out(out: Path, record: Record) -> None:
    """Do what is not done yet; every step may be repeated."""
    centre = out / _SUPERLINK
    version = record.versions[_SUPERLINK]
    source = centre / f".{version}"
    source = source if source.exists() else centre / version
    for name in (ROSTER_FILE, SIGNATURE_FILE):
        replace_file(out / "coordinator" / name, read_file(source / name))
    for site, content in record.revoked.items():
        replace_file(out / "sites" / site / REVOKED_FILE, json.dumps(content).encode() + b"\n")
    for name, new in record.versions.items():
        switch_version(out / name, new)
    if record.promote:
        _promote(out)
    try:
        (out / CHANGE_FILE).unlink()
        sync_folder(out)
    except OSError as error:
        raise unwritable(out / CHANGE_FILE, error) from error
    for name in record.versions:
        prune_versions(out / name)


def _promote(out: Path) -> None:
    """Put the next authority in the place of the present one, whose keys are removed."""
    present, following, retired = out / "authority", out / NEXT_AUTHORITY, out / ".authority.old"
    try:
        if following.exists():
            if present.exists():
                present.rename(retired)
            following.rename(present)
            sync_folder(out)
        (present / "cross.crt").unlink(missing_ok=True)
        if retired.exists():
            shutil.rmtree(retired)
    except OSError as error:
        raise unwritable(present, error) from error
