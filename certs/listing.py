"""What the commands print: aligned columns, and one line for each thing that was done."""

from __future__ import annotations

from collections.abc import Sequence

from certs.report import Report
from certs.revocation import Revocation
from certs.rollover import Stage
from certs.rotation import Rotated

_COLUMNS = (
    "name",
    "issuer",
    "names",
    "days left",
    "renew from",
    "key mode",
    "key matches",
    "serial on disk",
    "serial in a handshake",
)


def render_report(report: Report) -> list[str]:
    """Return the table of an inspection, then its warnings and problems."""
    lines: list[Sequence[str]] = [_COLUMNS]
    for row in report.rows:
        days = "-" if row.days_left is None else str(row.days_left)
        matches = {True: "yes", False: "NO", None: "-"}[row.matches]
        certificate = (row.name, row.issuer, ", ".join(row.names) or "-", days, row.renewal or "-")
        lines.append((*certificate, row.mode, matches, row.serial or "-", row.live or "-"))
    if not any(row.live for row in report.rows):
        lines = [line[:-1] for line in lines]
    return [
        *_align(lines),
        *(f"warning: {warning}" for warning in report.warnings),
        *(f"problem: {problem}" for problem in report.problems),
    ]


def render_rotated(rotated: Sequence[Rotated]) -> list[str]:
    """Return a line for each certificate that was replaced."""
    return [
        f"{one.name}: serial {one.old_serial} replaced by {one.new_serial}, until {one.until}"
        for one in rotated
    ]


def render_stage(stage: Stage) -> list[str]:
    """Return what a stage of the rollover did and what comes next."""
    lines = [f"stage done: {stage.name}", *render_rotated(stage.rotated)]
    return [*lines, f"next: {stage.following}"]


def render_revocation(revocation: Revocation) -> list[str]:
    """Return what was revoked, or that there was nothing to do."""
    serials = ", ".join(revocation.serials) or "none that can be read"
    done = "revoked" if revocation.anew else "nothing to do: revoked before"
    return [f"site {revocation.site}: {done}, {revocation.moment}, serials {serials}"]


def _align(lines: Sequence[Sequence[str]]) -> list[str]:
    """Put cells into columns of equal width."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
