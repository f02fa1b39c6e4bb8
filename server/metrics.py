"""Metrics: one JSON line per event of a run, appended as it happens.

Events: `joined` (a site and its software), `unusable` (one that cannot take part, and why),
`site` (one site in one round: outcome, bytes, figures), `round` (a finished round), `evaluation`
(held-out scores after a round), `rollback` (a round whose adapter was worse and not promoted).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fedqlora.errors import CheckpointError
from fedqlora.files import write_durably


class Metrics:
    """The metrics file of a run.

    Args:
        path: the JSON lines file; made at the first event.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, event: str, **facts: Any) -> None:
        """Write one line.

        Raises:
            CheckpointError: it cannot be written.
        """
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise CheckpointError(
                f"{self._path} cannot be written ({error.strerror}); free space, then resume"
            ) from None

    def read(self) -> list[dict[str, Any]]:
        """All lines; a last line cut off by a crash is left out."""
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def forget_after(self, round_: int) -> None:
        """Drop events of rounds that have no checkpoint: they will be run again."""
        kept = [line for line in self.read() if line.get("round", 0) <= round_]
        write_durably(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
