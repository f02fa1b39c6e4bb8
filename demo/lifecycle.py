"""Changes of keys while a federation works: made, dealt to each party, and seen to hold.

    python -m demo.lifecycle rotate|rollover|revoke --deal /deal
    python -m demo.lifecycle revoke --site b --out certs/out --connect HOST:9092 --control HOST:8000

`python -m certs` changes the folder of all parties; here the development cluster's volumes get
their shares of it, a revoked site's SuperNode is unregistered too, and the running SuperLink is
asked: which certificate it serves, whether the run goes on, who is still online.

Exit status: 0 all is well, 1 a problem was found, 2 the command was misused.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from certs.files import CURRENT, CertificateError
from certs.handshake import prove, read_address
from certs.listing import render_revocation, render_rotated, render_stage
from certs.parties import list_kept, list_sites
from certs.revocation import revoke
from certs.rollover import roll_over
from certs.rotation import rotate
from demo.shares import list_shares
from fedqlora.errors import FederationError, FedqloraError
from server.checkpoint import RunFolder
from server.control import ControlClient
from server.enrolment import evict_site
from server.state import RunState
from server.status import list_run

Said = tuple[str, object, Sequence[str]]
"""What a step has to say: its key in the JSON document, its value there, its lines for a person."""


class Change:
    """One change of keys in a federation that works."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Takes note of what goes on before it.

        Raises:
            FedqloraError: the SuperLink does not answer; nothing was changed.
            CertificateError: an address is none, or there are no keys.
        """
        self._options = options
        self._out: Path = options.out or options.deal / "certs"
        self._address = read_address(options.connect)
        with self._connect() as control:
            control.wait(options.patience_seconds)
            self._online = _list_online(control)
            self._runs = [run for run in control.list_runs() if run.active]

    def carry_out(self) -> Iterator[Said]:
        """Changes the keys and says what is so, step by step.

        Raises:
            CertificateError: the keys cannot be changed, or the SuperLink does not take them.
            FedqloraError: a site or a run was lost by the change.
        """
        command = self._options.command
        if command == "rotate":
            rotated = rotate(self._out, self._options.sites)
            yield "rotated", [asdict(one) for one in rotated], render_rotated(rotated)
        elif command == "rollover":
            force, accepted = self._options.force, self._options.accepted
            stage = roll_over(self._out, force=force, accepted=accepted)
            yield "stage", asdict(stage), render_stage(stage)
        else:
            revocation = revoke(self._out, self._options.site)
            yield "revocation", asdict(revocation), render_revocation(revocation)
        if self._options.deal is not None:
            dealt = self._deal()
            yield "dealt", dealt, [f"dealt: {', '.join(dealt) or 'nothing, all had it'}"]
        live = prove(self._out, self._address, list_kept(self._out), self._options.patience_seconds)
        yield "live", live, [f"live: {self._options.connect} serves serial {live}"]
        with self._connect() as control:
            gone: set[str] = set()
            if command == "revoke":
                gone = {self._options.site}
                said = list(self._evict(control))
                yield "eviction", said, said
            runs = self._describe_runs(control)
            yield "runs", runs, runs
            online = _list_online(control)
            yield "online", sorted(online), [f"online: {', '.join(sorted(online)) or 'no site'}"]
            if lost := sorted(self._online - online - gone):
                raise FederationError(
                    f"{', '.join(lost)} went offline meanwhile: see `make status` and `make logs`."
                )

    def _deal(self) -> list[str]:
        """Gives each volume what is new for it; returns their names."""
        deal: Path = self._options.deal
        shares = list_shares(deal, list_sites(self._out))
        return [str(share.volume.relative_to(deal)) for share in shares if share.deal()]

    def _evict(self, control: ControlClient) -> Iterator[str]:
        """Unregisters the revoked site's SuperNode, if that was not done before."""
        site = self._options.site
        if any(one.name == site and one.status != "unregistered" for one in control.list_nodes()):
            yield from evict_site(control, site)
        else:
            yield f"site {site}: no SuperNode of it is registered"

    def _describe_runs(self, control: ControlClient) -> list[str]:
        """A line for each run that was going before the change.

        Raises:
            FederationError: one has failed since.
        """
        lines = []
        for before in self._runs:
            now = control.read_run(before.run_id) or before
            if now.outcome == "failed":
                raise FederationError(
                    f"Run {_name(now)} failed meanwhile ({now.details or 'no reason was given'}): "
                    "see its status, then resume it."
                )
            lines.append(f"run {_name(now)}: {self._describe(now)}")
        return lines or ["no run is going"]

    def _describe(self, run: RunState) -> str:
        if not run.active:
            return f"{run.outcome} meanwhile"
        runs: Path | None = self._options.runs
        if runs is None or not run.folder:
            return "still going"
        folder = runs / run.folder
        return f"still going, {list_run(RunFolder(folder), {run.folder})[2]} rounds done"

    def _connect(self) -> ControlClient:
        """A client that trusts what the SuperLink has now: a change may have replaced it."""
        return ControlClient(self._options.control, self._out / "superlink" / CURRENT / "root.crt")


def _name(run: RunState) -> str:
    """The run folder's name, or Flower's number for an app that has none."""
    return run.folder or str(run.run_id)


def _list_online(control: ControlClient) -> set[str]:
    """Names of the sites that are online."""
    return {node.name for node in control.list_nodes() if node.status == "online"}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.lifecycle", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    rotation = commands.add_parser("rotate", help="new keys and certificates")
    rotation.add_argument("--sites", type=lambda text: text.split(","), help="these and no others")
    rollover = commands.add_parser("rollover", help="the next stage of a new authority")
    rollover.add_argument("--force", action="store_true", help="retire although a site is behind")
    rollover.add_argument(
        "--accepted",
        type=lambda text: text.split(","),
        default=[],
        help="sites with keys of their own that have accepted their reply since `switch`",
    )
    revocation = commands.add_parser("revoke", help="a site may not come any more")
    revocation.add_argument("--site", required=True, help="its name")
    for command in (rotation, rollover, revocation):
        keys = command.add_mutually_exclusive_group(required=True)
        keys.add_argument("--deal", type=Path, help="the cluster's volumes, all parties' in certs")
        keys.add_argument("--out", type=Path, help="the folder of all parties, read by them")
        command.add_argument("--connect", required=True, help="HOST:PORT of the Fleet API")
        control = os.environ.get("FEDQLORA_CONTROL")
        command.add_argument(
            "--control", default=control, required=not control, help="HOST:PORT of the Control API"
        )
        command.add_argument(
            "--runs", type=Path, default=os.environ.get("FEDQLORA_RUNS"), help="run folders"
        )
        command.add_argument("--patience-seconds", type=float, default=60.0)
        command.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Make one change and return the exit status."""
    options = build_parser().parse_args(arguments)
    content: dict[str, object] = {}
    status = 0
    try:
        for key, value, lines in Change(options).carry_out():
            content[key] = value
            if not options.json:
                print("\n".join(lines), flush=True)
    except (CertificateError, FedqloraError) as error:
        content["error"], status = str(error), error.exit_code
        if not options.json:
            sys.stderr.write(f"error: {error}\n")
    if options.json:
        print(json.dumps(content, indent=2))
    return status


if __name__ == "__main__":
    sys.exit(main())
