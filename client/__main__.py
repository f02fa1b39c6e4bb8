"""Help for a hospital's administrator: `python -m client digest --models FOLDER NAME`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedqlora.engine.base import base_digest, resolve_base
from fedqlora.errors import FedqloraError


def main(arguments: list[str] | None = None) -> int:
    """Print what `models.digests` in policy.toml needs; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m client", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    digest = commands.add_parser("digest", help="digest of a base model's files")
    digest.add_argument("--models", type=Path, required=True, help="folder of base models")
    digest.add_argument("base", help="folder in it, or a hub id")
    options = parser.parse_args(arguments)
    try:
        print(base_digest(resolve_base(options.base, options.models)))
    except FedqloraError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
