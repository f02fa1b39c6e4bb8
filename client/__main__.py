"""Help for a hospital's administrator: base models, and the ledger of privacy spent.

python -m client fetch|digest --models FOLDER NAME
python -m client ledger init --site NAME --state FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from client.fetch import fetch
from client.ledger import Ledger
from fedqlora.engine.base import base_digest, resolve_base
from fedqlora.errors import FedqloraError


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and carry it out; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m client", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    digest = commands.add_parser("digest", help="digest of a base model's files")
    digest.add_argument("base", help="folder in MODELS, or a hub id")
    download = commands.add_parser("fetch", help="download a hub model and print its digest")
    download.add_argument("base", help="hub id, such as google/flan-t5-base")
    for command in (digest, download):
        command.add_argument("--models", type=Path, required=True, help="folder of base models")
    ledger = commands.add_parser("ledger", help="the record of the privacy that patients spent")
    ledger.add_argument("action", choices=["init"], help="make it, on a site's first start only")
    ledger.add_argument("--site", required=True, help="the site's name")
    ledger.add_argument("--state", type=Path, required=True, help="the trainer's state folder")
    options = parser.parse_args(arguments)
    try:
        if options.command == "digest":
            print(base_digest(resolve_base(options.base, options.models)))
        elif options.command == "ledger":
            path = options.state / "ledger.jsonl"
            Ledger.create(path, options.site, options.state / "audit.jsonl")
            print(f"made {path}; back it up with the site's keys")
        else:
            _fetch(options.base, options.models)
    except FedqloraError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _fetch(hub_id: str, models: Path) -> None:
    """Print the digest, and the lines of policy.toml that approve the model."""
    folder, made = fetch(hub_id, models)
    digest = base_digest(folder)
    print(f"{'fetched' if made else 'found'} {folder}\ndigest: {digest}")
    print(f'to approve it, in policy.toml:\n[models]\ndigests = ["{digest}"]')


if __name__ == "__main__":
    sys.exit(main())
