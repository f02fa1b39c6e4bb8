"""Versions of a party's folder: the next one is written whole, then `current` points at it.

A version that nobody uses yet is hidden by a dot. What has a dot is therefore never missed: it
is removed when a change was interrupted before it counted.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from certs.files import (
    CURRENT,
    FIRST_VERSION,
    CertificateError,
    read_file,
    sync_folder,
    unwritable,
    write_folder,
)

KEPT_VERSIONS = 3
_VERSION = re.compile(r"v([1-9]\d{0,8})")


def list_versions(folder: Path) -> list[str]:
    """Return the names of a folder's versions, oldest first."""
    names = [one.name for one in folder.iterdir() if _VERSION.fullmatch(one.name)]
    return sorted(names, key=_number)


def read_version(folder: Path) -> dict[str, bytes]:
    """Return the files of the version that is in use, by name.

    Raises:
        CertificateError: there is none, or a file cannot be read.
    """
    # Resolved once: all files are of one version.
    source = (folder / CURRENT).resolve()
    try:
        names = sorted(one.name for one in source.iterdir())
    except OSError as error:
        raise CertificateError(
            f"{folder / CURRENT} cannot be read ({error.strerror}); restore {folder}."
        ) from error
    return {name: read_file(source / name) for name in names}


def stage_version(folder: Path, files: Mapping[str, bytes]) -> str:
    """Write the next version, hidden, and return its name; an earlier hidden one is dropped.

    A folder that does not exist yet is hidden as a whole, `current` included.

    Raises:
        CertificateError: it cannot be written; nothing is left behind.
    """
    if not folder.exists():
        shutil.rmtree(_newcomer(folder), ignore_errors=True)
        write_folder(_newcomer(folder), files, versioned=True)
        return FIRST_VERSION
    sweep(folder)
    version = f"v{max(map(_number, list_versions(folder)), default=0) + 1}"
    write_folder(folder / f".{version}", files)
    return version


def switch_version(folder: Path, version: str) -> None:
    """Put a version in use, in one step; what was done already is not done again.

    Raises:
        CertificateError: it is not there, or the folder cannot be written.
    """
    hidden, link = folder / f".{version}", folder / f".{CURRENT}.new"
    try:
        if _newcomer(folder).exists() and not folder.exists():
            _newcomer(folder).rename(folder)
            sync_folder(folder.parent)
        if hidden.exists():
            hidden.rename(folder / version)
        if not (folder / version).is_dir():
            raise CertificateError(f"{folder / version} is missing; restore it.")
        if not (folder / CURRENT).is_symlink() or (folder / CURRENT).readlink() != Path(version):
            link.unlink(missing_ok=True)
            link.symlink_to(version)
            link.rename(folder / CURRENT)
        sync_folder(folder)
    except OSError as error:
        raise unwritable(folder / CURRENT, error) from error


def prune_versions(folder: Path) -> None:
    """Remove all but the last versions, and what an interrupted change left; never `current`."""
    used = (folder / CURRENT).resolve().name
    surplus = [name for name in list_versions(folder)[:-KEPT_VERSIONS] if name != used]
    for name in surplus:
        shutil.rmtree(folder / name, ignore_errors=True)
    sweep(folder)


def sweep(folder: Path, start: str = ".") -> None:
    """Remove folders whose names start so: remains of a change that never counted."""
    if not folder.is_dir():
        return
    for one in folder.iterdir():
        if one.name.startswith(start) and one.is_dir() and not one.is_symlink():
            shutil.rmtree(one, ignore_errors=True)
        elif one.name == f".{CURRENT}.new":
            one.unlink(missing_ok=True)


def _newcomer(folder: Path) -> Path:
    """Where a folder lies before it counts."""
    return folder.with_name(f".{folder.name}")


def _number(version: str) -> int:
    return int(version.removeprefix("v"))
