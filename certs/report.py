"""What an inspection of keys and certificates found: a row for each key, and judgements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Row:
    """One private key, with its certificate if it has one; or one revocation list."""

    name: str
    issuer: str = "-"
    """Common name of the certificate's issuer."""
    names: Sequence[str] = ()
    """Subject alternative names of the certificate."""
    days_left: int | None = None
    """Whole days until the certificate ends; negative afterwards, None without one."""
    renewal: str | None = None
    """Day from which it should be renewed, in UTC; None for what is not renewed by itself."""
    serial: str | None = None
    """Serial number of the certificate in the folder, in hex."""
    live: str | None = None
    """Serial number that a handshake with the running SuperLink used; None if none was made."""
    mode: str
    """Permission bits of the key file, such as `0600`."""
    matches: bool | None
    """Whether the key fits its certificate and the roster; None if there is no key here."""


@dataclass(frozen=True)
class Report:
    """The findings of one inspection; all is well if `problems` is empty."""

    rows: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def require(self, holds: bool, problem: str) -> None:
        """Record a problem, once, unless what was checked holds."""
        if not holds and problem not in self.problems:
            self.problems.append(problem)
