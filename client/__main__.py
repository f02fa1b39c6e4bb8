"""Help for a hospital's administrator.

python -m client fetch|digest --models FOLDER NAME    a base model's files and digest
python -m client data-report FOLDER                   what a trainer would find in the records
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from client.data_report import report
from client.fetch import fetch
from fedqlora.engine.base import base_digest, resolve_base
from fedqlora.errors import DataError, FedqloraError


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
    data = commands.add_parser("data-report", help="counts, lengths and problems, never text")
    data.add_argument("data", type=Path, help="data file, or a folder of them")
    options = parser.parse_args(arguments)
    try:
        if options.command == "data-report":
            text, usable = report(options.data)
            print(text)
            return 0 if usable else DataError.exit_code
        if options.command == "digest":
            print(base_digest(resolve_base(options.base, options.models)))
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
