"""Bundle: the Flower app as it is shipped to SuperLink and sites, and the digest that names it."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from flwr.cli.build import build_fab_from_files

from fedqlora.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[1]
"""The folder of our own app: it holds pyproject.toml."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A packed app."""

    content: bytes
    """A zip archive, the same bytes whenever the same files are packed."""

    @property
    def digest(self) -> str:
        """SHA-256 in hex: what `apps.digests` of a site's policy lists, and Flower's own name."""
        return hashlib.sha256(self.content).hexdigest()


def pack(app: Path) -> Bundle:
    """Packs the files that `fab-include` in the folder's pyproject.toml names.

    Raises:
        ConfigError: there is no app that can be packed.
    """
    try:
        with warnings.catch_warnings():
            # Flower 1.39 names a pattern style that its pathspec has renamed.
            warnings.simplefilter("ignore", DeprecationWarning)
            return Bundle(content=build_fab_from_files(_collect(app.resolve()))[0])
    except Exception as error:  # Flower raises click's, typer's and its own errors here
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConfigError(
            f"The Flower app in {app} cannot be packed ({reason}): check its pyproject.toml."
        ) from error


def _collect(app: Path) -> dict[str, Path]:
    """The folder's files by their relative POSIX path, no link among them.

    Flower's own walk goes through hidden folders too: a virtual environment has tens of thousands
    of files, and took 5 s of every start of a run.
    """
    files = {}
    for folder, folders, names in os.walk(app):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in names):
            if not path.is_symlink():
                files[path.relative_to(app).as_posix()] = path
    return files
