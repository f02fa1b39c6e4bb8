"""A program of the demo before it is started: what runs, where, and with what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Program:
    """One command of a local federation."""

    module: str
    """What runs, as `python -m` takes it."""
    arguments: Sequence[str]
    """Its command line."""
    log: Path
    """File that its output is appended to."""
    environment: Mapping[str, str]
    """All of its environment variables."""
    folder: Path
    """Its working folder."""
