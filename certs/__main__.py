"""The command line of keys and certificates: `python -m certs make` and `verify`.

Exit status: 0 all is well, 1 a problem was found, 2 the command was misused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from certs.files import CertificateError
from certs.inspection import inspect_all
from certs.report import Report
from certs.site import make_all

COLUMNS = ("name", "issuer", "names", "days left", "key mode", "key matches")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _build_parser().parse_args(arguments)
    try:
        if options.command == "make":
            return _make(options)
        return _verify(options)
    except CertificateError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _make(options: argparse.Namespace) -> int:
    made = make_all(options.out, options.sites, options.host)
    for line in made or ["nothing to do"]:
        print(line)
    return 0


def _verify(options: argparse.Namespace) -> int:
    report = inspect_all(options.out)
    print(_render_table(report))
    for warning in report.warnings:
        print(f"warning: {warning}")
    for problem in report.problems:
        print(f"problem: {problem}")
    return 1 if report.problems else 0


def _render_table(report: Report) -> str:
    """Return the rows of a report as aligned columns under a heading."""
    lines = [COLUMNS]
    for row in report.rows:
        days = "-" if row.days_left is None else str(row.days_left)
        matches = {True: "yes", False: "NO", None: "-"}[row.matches]
        names = ", ".join(row.names) or "-"
        lines.append((row.name, row.issuer, names, days, row.mode, matches))
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m certs", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="make what is missing; never replaces anything")
    make.add_argument("--sites", required=True, type=_split, help="site names, such as a,b,c")
    make.add_argument(
        "--host",
        nargs="+",
        action="extend",
        default=[],
        help="DNS names or addresses under which sites reach the SuperLink, besides local ones",
    )
    verify = commands.add_parser("verify", help="check every certificate, key and the roster")
    for command in (make, verify):
        command.add_argument("--out", required=True, type=Path, help="the folder of all parties")
    return parser


def _split(text: str) -> list[str]:
    """Split a comma-separated list; blanks around names are a habit, not a name."""
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
