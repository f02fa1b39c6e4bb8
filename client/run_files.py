"""RunFiles: one small file a run, readable by the site alone, that is replaced whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedqlora.files import write_durably


class RunFiles:
    """The files of one purpose.

    Args:
        folder: holds them; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, run: str) -> Path:
        """Where a run's file lies, or would."""
        # A digest, since a run's name comes from outside.
        return self._folder / f"{hashlib.sha256(run.encode()).hexdigest()}.json"

    def write(self, run: str, text: str) -> None:
        """Replace a run's file; it is on disk when this returns.

        Raises:
            OSError: it cannot be written; the one before is still there.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_durably(self.path(run), text.encode(), mode=0o600)
