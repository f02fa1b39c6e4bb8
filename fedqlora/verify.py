"""Checks what a run left behind; needs nothing of the run, no torch and no network.

python -m fedqlora.verify receipts FILE --key SITE=HEX [--key ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedqlora.errors import ConfigError, FedqloraError
from fedqlora.keys import public_key
from fedqlora.privacy.receipts import check_receipts


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and carry it out; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fedqlora.verify", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_receipts(commands.add_parser("receipts", help="recompute epsilon from signed receipts"))
    options = parser.parse_args(arguments)
    try:
        return verify_receipts(options)
    except FedqloraError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


def add_receipts(parser: argparse.ArgumentParser) -> None:
    """The arguments of `receipts`."""
    parser.add_argument("path", type=Path, help="receipts.jsonl of a run folder or of a site")
    parser.add_argument(
        "--key",
        action="append",
        default=[],
        metavar="SITE=HEX",
        help="a site's public signing key, got from the site itself or the roster",
    )


def verify_receipts(options: argparse.Namespace) -> int:
    """Check a file of receipts and print what each site has spent.

    Raises:
        ReceiptError: one does not hold.
        ConfigError: a key is not SITE=HEX.
    """
    keys = {}
    for text in options.key:
        site, equals, digits = text.partition("=")
        if not equals:
            raise ConfigError(f"--key {text[:80]} is not SITE=HEX; write for example a=0f3c...")
        keys[site] = public_key(digits)
    receipts = check_receipts(options.path, keys)
    for one in receipts:
        print(
            f"site {one.site}, run {one.run}, round {one.round}: epsilon of the round "
            f"{one.epsilon_round:.6f}, of the run so far {one.epsilon_run:.6f} at delta "
            f"{one.delta:.3g}; cohort {one.cohort} by {one.unit} over all runs "
            f"{one.epsilon_cohort:.6f} at delta {one.cohort_delta:.3g}"
        )
    print(f"{len(receipts)} receipts hold")
    return 0


if __name__ == "__main__":
    sys.exit(main())
