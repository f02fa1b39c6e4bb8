"""Checks audit logs and receipts of privacy spent; needs nothing of a run, and no network.

    python -m fedqlora.verify receipts receipts.jsonl --key SITE=HEX
    python -m fedqlora.verify audit.jsonl
    python -m fedqlora.verify audit.jsonl --head audit.head --key coordinator.pub
    python -m fedqlora.verify site/audit.jsonl --against runs/audit.jsonl --site b

The chain alone shows edited, removed and reordered lines. A signed head shows also that the log
was cut off or written anew since it was signed; `--against` holds a site's log and the centre's
against each other, both ways. Exit status: 0 all fits, 1 it does not, 2 wrong use.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedqlora.audit import verify
from fedqlora.errors import ConfigError, FedqloraError, HistoryError
from fedqlora.head import Head, SignedHead, read_head
from fedqlora.keys import load_public_key, public_key


def check_head(path: Path, hashes: Sequence[bytes], signed: SignedHead) -> None:
    """Refuse a log that does not contain a head that its owner signed.

    Args:
        path: the log, for the message.
        hashes: its lines' hashes, from `audit.verify`.
        signed: the head.

    Raises:
        HistoryError: it was cut off or written anew since.
    """
    if not _contains(hashes, signed.head):
        raise HistoryError(
            f"{path} has {len(hashes)} lines and does not contain line {signed.head.number} as "
            f"its owner signed it on {_date(signed.time)}: it was cut off or written anew"
        )


def compare(site: str, log: Path, centre: Path) -> tuple[int, int]:
    """Hold a site's log and the centre's against each other; both chains are checked first.

    Returns:
        How many heads of the site's log the centre had recorded, and the other way round.

    Raises:
        HistoryError: one log lacks a line that the other has recorded of it; names whose.
        AuditError: a chain is broken.
    """
    own, others = verify(log), verify(centre)
    of_site = list(_recorded(centre, "site", site))
    of_centre = list(_recorded(log, "server", None))
    for heads, hashes, lacking, witness in (
        (of_site, own, log, centre),
        (of_centre, others, centre, log),
    ):
        for line, head in heads:
            if not _contains(hashes, head):
                raise HistoryError(
                    f"{lacking} does not contain its line {head.number} as line {line} of "
                    f"{witness} recorded it: it was cut off or written anew"
                )
    return len(of_site), len(of_centre)


def _contains(hashes: Sequence[bytes], head: Head) -> bool:
    if head.number == 0:
        return True
    return head.number <= len(hashes) and hashes[head.number - 1] == head.digest


def _recorded(log: Path, name: str, site: str | None) -> Iterator[tuple[int, Head]]:
    """Heads of the other side that a log holds, since that side was last forgotten, by line."""
    found: list[tuple[int, Head]] = []
    with log.open("rb") as file:
        for number, text in enumerate(file, start=1):
            line = json.loads(text)
            if site is not None and line.get("site") != site:
                continue
            if line["event"] == "forgotten":
                found.clear()
            elif line["event"] != "contradicted" and line.get(f"{name}_number", 0) > 0:
                head = Head(line[f"{name}_number"], bytes.fromhex(line[f"{name}_hash"]))
                found.append((number, head))
    yield from found


def _date(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _load_key(given: str) -> Ed25519PublicKey:
    """A public key from a PEM file, or 64 hexadecimal digits as in the roster."""
    return load_public_key(Path(given)) if Path(given).exists() else public_key(given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what the command line names; returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["receipts"]:
        return _check_receipts(given[1:])
    parser = argparse.ArgumentParser(prog="python -m fedqlora.verify", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("log", type=Path, help="audit log")
    parser.add_argument("--head", type=Path, help="its signed head")
    parser.add_argument("--key", help="the owner's public key: PEM file, or hex as in the roster")
    parser.add_argument("--against", type=Path, metavar="LOG", help="the centre's audit log")
    parser.add_argument("--site", help="whose log it is, for --against")
    options = parser.parse_args(given)
    try:
        if (options.head is None) != (options.key is None):
            raise ConfigError("--head and --key go together; give both")
        if (options.against is None) != (options.site is None):
            raise ConfigError("--against and --site go together; give both")
        for line in _report(options):
            sys.stdout.write(f"{line}\n")
    except FedqloraError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _check_receipts(arguments: Sequence[str]) -> int:
    """`receipts`: recompute epsilon from signed receipts; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fedqlora.verify receipts")
    parser.add_argument("path", type=Path, help="receipts.jsonl of a run folder or of a site")
    parser.add_argument(
        "--key",
        action="append",
        default=[],
        metavar="SITE=HEX",
        help="a site's public signing key, got from the site itself or the roster",
    )
    try:
        return verify_receipts(parser.parse_args(arguments))
    except FedqloraError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


def verify_receipts(options: argparse.Namespace) -> int:
    """Check a file of receipts and print what each site has spent.

    Raises:
        ReceiptError: one does not hold.
        ConfigError: a key is not SITE=HEX.
    """
    # Only here: an audit log is checked without the accounting, which takes a second to load.
    from fedqlora.privacy.receipts import check_receipts

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


def _report(options: argparse.Namespace) -> Iterator[str]:
    """One line for everything that fits.

    Raises:
        AuditError: something does not.
    """
    hashes = verify(options.log)
    yield f"chain: {len(hashes)} lines fit"
    if options.head is not None:
        signed = read_head(options.head, _load_key(options.key))
        check_head(options.log, hashes, signed)
        yield f"head: line {signed.head.number}, signed {_date(signed.time)}, is in the log"
    if options.against is not None:
        site, centre = compare(options.site, options.log, options.against)
        yield f"peer: {site} heads that the centre recorded and {centre} of the centre's fit"


if __name__ == "__main__":
    sys.exit(main())
