"""The command line of keys and certificates: make, verify, rotate, rollover, revoke, enrolment.

Exit status: 0 all is well, 1 a problem was found, 2 the command was misused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from certs.change import NEXT_AUTHORITY
from certs.enrolment import add_commands
from certs.files import CertificateError, MisuseError, read_file
from certs.handshake import prove, read_address
from certs.inspection import inspect_all
from certs.listing import render_report, render_revocation, render_rotated, render_stage
from certs.outcome import Outcome
from certs.parties import list_enrolled, list_kept
from certs.reply import name_reply
from certs.revocation import revoke
from certs.rollover import roll_over
from certs.rotation import rotate
from certs.site import make_all

SHORTEST_PASSPHRASE = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _build_parser().parse_args(arguments)
    content: dict[str, object] = {}
    status = 0
    try:
        address = read_address(options.connect) if getattr(options, "connect", None) else None
        outcome: Outcome = options.run(options)
        content, status = dict(outcome.content), outcome.exit_code
        _say(options, outcome.lines)
        if address is not None and outcome.proof is not None:
            live = prove(options.out, address, outcome.proof, options.patience_seconds)
            content["live"] = live
            _say(options, [f"live: {options.connect} serves serial {live}"])
    except CertificateError as error:
        if options.debug:
            raise
        content["error"] = str(error)
        status = error.exit_code
        if not options.json:
            print(f"error: {error}", file=sys.stderr)
    if options.json:
        print(json.dumps(content, indent=2))
    return status


def _say(options: argparse.Namespace, lines: Sequence[str]) -> None:
    """Print lines at once, unless all ends as one JSON document."""
    if not options.json:
        print("\n".join(lines), flush=True)


def _make(options: argparse.Namespace) -> Outcome:
    passphrase = _read_passphrase(options.root_passphrase_file)
    begun = any((options.out / name).exists() for name in ("authority", NEXT_AUTHORITY))
    if passphrase is None and not options.development and not begun:
        raise MisuseError(
            "The root's key needs a passphrase: name its file with --root-passphrase-file, or say "
            "--development for keys that protect nobody's data."
        )
    made = make_all(options.out, options.sites, options.host, passphrase=passphrase)
    return Outcome(made or ["nothing to do"], {"made": made})


def _verify(options: argparse.Namespace) -> Outcome:
    address = read_address(options.connect) if options.connect else None
    report = inspect_all(options.out, connect=address)
    return Outcome(render_report(report), asdict(report), 1 if report.problems else 0)


def _rotate(options: argparse.Namespace) -> Outcome:
    sites, superlink = options.sites, options.superlink or options.sites is None
    if options.superlink and sites is None:
        sites = []
    rotated = rotate(options.out, sites, superlink=superlink, hosts=options.host)
    proof = [one.name.removeprefix("sites/") for one in rotated if one.name != "superlink"]
    enrolled = list_enrolled(options.out) if sites is None else []
    lines = render_rotated(rotated)
    lines += [
        f"sites/{site}: not rotated, keeps its own keys; it renews by `certs request --renew` there"
        for site in enrolled
    ]
    content = {"rotated": [asdict(one) for one in rotated], "enrolled": enrolled}
    return Outcome(lines, content, proof=proof)


def _rollover(options: argparse.Namespace) -> Outcome:
    passphrase = _read_passphrase(options.root_passphrase_file)
    stage = roll_over(
        options.out, force=options.force, accepted=options.accepted, passphrase=passphrase
    )
    lines, enrolled = list(render_stage(stage)), list_enrolled(options.out)
    lines += [f"site {site}: send it {name_reply(options.out, site)}" for site in enrolled]
    content = {**asdict(stage), "enrolled": enrolled}
    return Outcome(lines, content, proof=list_kept(options.out))


def _revoke(options: argparse.Namespace) -> Outcome:
    revocation = revoke(options.out, options.site)
    return Outcome(render_revocation(revocation), asdict(revocation), proof=list_kept(options.out))


def _read_passphrase(path: Path | None) -> bytes | None:
    """Return the passphrase in a file, without the end of its line."""
    if path is None:
        return None
    passphrase = read_file(path).rstrip(b"\r\n")
    if len(passphrase) < SHORTEST_PASSPHRASE:
        raise MisuseError(
            f"The passphrase in {path} has less than {SHORTEST_PASSPHRASE} characters; "
            "write a longer one."
        )
    return passphrase


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m certs", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], Outcome], help_: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_)
        command.add_argument(
            "--out", required=True, type=Path, help="folder of all parties; at a site, its own"
        )
        command.add_argument("--json", action="store_true", help="print one JSON document")
        command.set_defaults(run=run)
        return command

    make = add("make", _make, "make what is missing; never replaces anything")
    make.add_argument("--sites", required=True, type=_split, help="site names, such as a,b,c")
    make.add_argument("--development", action="store_true", help="leave the root's key open")
    verify = add("verify", _verify, "check every certificate, key, roster and revocation list")
    rotation = add("rotate", _rotate, "new keys and certificates for the SuperLink and all sites")
    rotation.add_argument("--sites", type=_split, help="these sites only, such as a,b")
    rotation.add_argument("--superlink", action="store_true", help="the SuperLink (and --sites)")
    rollover = add("rollover", _rollover, "the next stage of a new authority")
    rollover.add_argument("--force", action="store_true", help="retire although a site is behind")
    rollover.add_argument(
        "--accepted",
        type=_split,
        default=[],
        help="sites with keys of their own that have accepted their reply since `switch`",
    )
    revocation = add("revoke", _revoke, "a site may not come any more")
    revocation.add_argument("--site", required=True, help="its name")
    add_commands(add)
    for command in (make, rotation):
        command.add_argument(
            "--host",
            nargs="+",
            action="extend",
            default=[],
            help="DNS names or addresses under which sites reach the SuperLink, besides others",
        )
    for command in (make, rollover):
        command.add_argument(
            "--root-passphrase-file", type=Path, help="holds the passphrase of the root's key"
        )
    for command in (verify, rotation, rollover, revocation):
        command.add_argument("--connect", metavar="HOST:PORT", help="the running SuperLink")
    for command in (rotation, rollover, revocation):
        command.add_argument(
            "--patience-seconds", type=float, default=30.0, help="how long it may take new files"
        )
    return parser


def _split(text: str) -> list[str]:
    """Split a comma-separated list; blanks around names are a habit, not a name."""
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
