"""Help for a hospital's administrator; in a kit, `./site` calls these without a network.

python -m client fetch|digest --models FOLDER NAME      a base model, and its digest
python -m client check-data --data FOLDER               counts of records; never a text
python -m client data-report FOLDER                     lengths and problems too; never a text
python -m client status --state FOLDER --keys FOLDER    last round, bytes, certificate
python -m client audit --state FOLDER                   verifies the audit log
python -m client idle --state FOLDER                    status 3 while a round goes on
python -m client reach --keys FOLDER --superlink HOST:PORT    keys, admission and clocks
python -m client ledger init --site NAME --state FOLDER --keys FOLDER    of privacy spent, once
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

from client.fetch import fetch
from client.standing import list_standing, read_standing
from fedqlora.address import split_address
from fedqlora.engine.base import base_digest, resolve_base
from fedqlora.errors import DataError, FederationError, FedqloraError
from fedqlora.keys import load_signing_key
from fedqlora.tls import prepare_grpc

QUIET_SECONDS = 2.0
"""A reply is on its way for so long after its round is in the audit log."""


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and carry it out; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m client",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    digest = commands.add_parser("digest", help="digest of a base model's files")
    digest.add_argument("base", help="folder in MODELS, or a hub id")
    download = commands.add_parser("fetch", help="download a hub model and print its digest")
    download.add_argument("base", help="hub id, such as google/flan-t5-base")
    for command in (digest, download):
        command.add_argument("--models", type=Path, required=True, help="folder of base models")
    records = commands.add_parser("check-data", help="read all records, print counts")
    records.add_argument("--data", type=Path, required=True, help="file or folder of records")
    data = commands.add_parser("data-report", help="counts, lengths and problems, never text")
    data.add_argument("data", type=Path, help="data file, or a folder of them")
    status = commands.add_parser("status", help="last round, bytes sent, certificate days")
    status.add_argument("--keys", type=Path, required=True, help="folder with client.crt")
    audit = commands.add_parser("audit", help="verify the audit log")
    idle = commands.add_parser("idle", help="exit status 3 while a round goes on")
    reach = commands.add_parser("reach", help="one signed call: certificates, admission, clocks")
    reach.add_argument("--superlink", required=True, help="HOST:PORT of the SuperLink")
    reach.add_argument("--keys", type=Path, required=True, help="the SuperNode's keys")
    for command in (status, audit, idle):
        command.add_argument("--state", type=Path, required=True, help="the trainer's folder")
    ledger = commands.add_parser("ledger", help="the record of the privacy that patients spent")
    ledger.add_argument("action", choices=["init"], help="make it, on a site's first start only")
    ledger.add_argument("--site", required=True, help="the site's name")
    ledger.add_argument("--state", type=Path, required=True, help="the trainer's state folder")
    ledger.add_argument("--keys", type=Path, required=True, help="folder with signing.key")
    options = parser.parse_args(arguments)
    try:
        return _carry_out(options)
    except FedqloraError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


def _carry_out(options: argparse.Namespace) -> int:
    """Run one command; returns the exit status."""
    if options.command == "digest":
        print(base_digest(resolve_base(options.base, options.models)))
    elif options.command == "fetch":
        _fetch(options.base, options.models)
    elif options.command == "check-data":
        _check_data(options.data)
    elif options.command == "data-report":
        # Only here, as it loads far more than the other commands need.
        from client.data_report import report

        text, usable = report(options.data)
        print(text)
        return 0 if usable else DataError.exit_code
    elif options.command == "ledger":
        # Only here, as the accounting behind it loads far more than the other commands need.
        from client.ledger import LEDGER_FILE, make_ledger

        path = options.state / LEDGER_FILE
        key = load_signing_key(options.keys / "signing.key")
        if make_ledger(options.site, options.state, key):
            print(f"made {path}; back it up with the site's keys")
        else:
            print(f"found {path}; nothing was changed")
    elif options.command == "reach":
        _reach(options.keys, options.superlink)
    else:
        now = datetime.datetime.now(datetime.UTC)
        standing = read_standing(options.state / "audit.jsonl", now)
        if options.command == "idle":
            return 0 if not standing.training and standing.quiet_seconds >= QUIET_SECONDS else 3
        if options.command == "status":
            print(
                "\n".join(list_standing(standing, options.state, options.keys / "client.crt", now))
            )
        elif standing.lines:
            print(f"audit log: {standing.lines} lines fit their chain, head {standing.head}")
        else:
            print("audit log: empty, no instruction has come yet")
    return 0


def _reach(keys: Path, superlink: str) -> None:
    """Print that the SuperLink admits this site, or raise what is in the way."""
    prepare_grpc()
    # Only after gRPC was prepared.
    from client.enrolment import try_call
    from client.supernode import load_node_key
    from fedqlora.credentials import ReloadingIdentity

    identity = ReloadingIdentity(keys, "client").follow()
    key = load_node_key(identity.folder / "supernode.key")
    try:
        serial = try_call(split_address(superlink, "--superlink"), identity, key)
    except OSError as error:
        raise FederationError(
            f"The SuperLink at {superlink} cannot be reached ({error.strerror or error}): check "
            "its address, that it runs, and that a firewall lets containers out to it."
        ) from None
    print(f"admitted by {superlink} (serial {serial}), clocks agree")


def _check_data(data: Path) -> None:
    """Print what a trainer would read, in numbers."""
    # Only here, as it loads far more than the other commands need.
    from fedqlora.engine.records import load_records

    records = load_records(data)
    patients = len({record.patient for record in records})
    print(f"records: {len(records)}, patients: {patients}")


def _fetch(hub_id: str, models: Path) -> None:
    """Print the digest, and the lines of policy.toml that approve the model."""
    folder, made = fetch(hub_id, models)
    digest = base_digest(folder)
    print(f"{'fetched' if made else 'found'} {folder}\ndigest: {digest}")
    print(f'to approve it, in policy.toml:\n[models]\ndigests = ["{digest}"]')


if __name__ == "__main__":
    sys.exit(main())
