"""A hospital's settings and folders, refused before a container is made where they cannot do.

Containers run as user 10001. An engine would start with an unreadable folder all the same, and
only the first round would fail.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from deploy.cluster import RenderError

USER = 10001
"""User and group of every container."""

_DEFAULTS = {
    "FEDQLORA_DATA": "./data",
    "FEDQLORA_MODELS": "./models",
    "FEDQLORA_POLICY": "./policy",
    "FEDQLORA_KEYS_SUPERNODE": "./keys/supernode",
    "FEDQLORA_KEYS_TRAINER": "./keys/trainer",
}
_NEEDED = {
    "FEDQLORA_POLICY": ["policy.toml"],
    "FEDQLORA_KEYS_SUPERNODE": [
        f"current/{name}" for name in ("client.key", "client.crt", "ca.crt", "supernode.key")
    ],
    "FEDQLORA_KEYS_TRAINER": ["current/signing.key", "current/coordinator.pub"],
}


def read_settings(path: Path) -> dict[str, str]:
    """The settings of an .env file, as Compose reads them: KEY=VALUE lines, quotes optional.

    Raises:
        RenderError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RenderError(
            f"{path} cannot be read ({error.strerror}): copy .env.example there and fill it in."
        ) from None
    lines = [line.strip().removeprefix("export ") for line in text.splitlines()]
    pairs = [line.split("=", 1) for line in lines if "=" in line and not line.startswith("#")]
    return {key.strip(): _unquote(value.strip()) for key, value in pairs}


def check_folders(settings: Mapping[str, str], home: Path) -> None:
    """Refuses settings with which a site cannot work.

    Args:
        settings: what the .env says.
        home: folder of compose.yml, where relative paths start.

    Raises:
        RenderError: the first thing that is wrong.
    """
    for key in ("FEDQLORA_SITE", "FEDQLORA_SUPERLINK"):
        if not settings.get(key):
            raise RenderError(f"{key} is not set: the coordinator says what it is for your site.")
    host, _, port = settings["FEDQLORA_SUPERLINK"].rpartition(":")
    if not host or not port.isdigit():
        raise RenderError(
            f"FEDQLORA_SUPERLINK={settings['FEDQLORA_SUPERLINK']} is not HOST:PORT: write for "
            "example superlink.example.org:9092."
        )
    try:
        _check_paths(settings, home)
    except PermissionError as error:
        raise RenderError(
            f"{error.filename} cannot be looked into by this user: run this check with sudo."
        ) from None


def _check_paths(settings: Mapping[str, str], home: Path) -> None:
    """The part of check_folders that looks at the disk."""
    for key, default in _DEFAULTS.items():
        folder = home / (settings.get(key) or default)
        if not folder.is_dir():
            raise RenderError(
                f"{key}: the folder {folder} does not exist; make it or correct .env."
            )
        check_readable(key, folder.resolve())
        for name in _NEEDED.get(key, []):
            file = folder / name
            if not file.is_file():
                raise RenderError(f"{key}: {file} does not exist; put it there or correct .env.")
            check_readable(key, file.resolve())
    data = (home / (settings.get("FEDQLORA_DATA") or _DEFAULTS["FEDQLORA_DATA"])).resolve()
    records = sorted(path for path in data.rglob("*") if not path.is_symlink())
    if not any(path.is_file() for path in records):
        raise RenderError(f"FEDQLORA_DATA: {data} holds no file; put the records there.")
    for path in records:
        check_readable("FEDQLORA_DATA", path)


def check_readable(key: str, path: Path) -> None:
    """Refuses what user 10001 cannot read, by the mode bits of the path itself.

    A container sees only what is mounted, so the folders above it need not be open.

    Raises:
        RenderError: it is not readable; says which path.
    """
    needed = 0o5 if path.is_dir() else 0o4
    if not _allows(path, needed):
        what = "folder" if path.is_dir() else "file"
        raise RenderError(
            f"{key}: user {USER} of the container cannot read the {what} {path}; give it to that "
            f"user (`chown -R {USER}:{USER}`), or make it readable."
        )


def _allows(path: Path, needed: int) -> bool:
    """Whether the bits that count for the container's user are all set."""
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid == USER:
        mode >>= 6
    elif status.st_gid == USER:
        mode >>= 3
    return mode & needed == needed


def _unquote(value: str) -> str:
    """A value without its quotes, or without the comment behind it."""
    if value[:1] in ("'", '"') and value[-1:] == value[:1] and len(value) > 1:
        return value[1:-1]
    return value.split(" #", 1)[0].strip()
