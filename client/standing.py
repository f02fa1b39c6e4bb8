"""A site's standing, for its administrator: last round, bytes sent, and what its records are.

Read from the audit log and the certificate, with no network; never from the coordinator.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from fedqlora.audit import verify
from fedqlora.errors import AuditError, ConfigError


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What the audit log says of a site's part so far."""

    lines: int
    """Lines in the log; 0 where there is none yet."""
    head: str
    """Hash of the last line."""
    trained: str | None
    """The last round that was trained, with run and time; None before the first."""
    bytes_sent: int
    """Bytes of all updates handed out for sending."""
    updates: int
    """Number of these updates."""
    refused: int
    """Instructions that were refused."""
    training: bool
    """Whether a round began whose end is not in the log: one that goes on, or was cut off."""
    quiet_seconds: float
    """Time since the last line; infinite without one."""


def read_standing(log: Path, now: datetime.datetime) -> Standing:
    """Verify an audit log and sum it up.

    Raises:
        AuditError: its chain is broken, or it cannot be read.
    """
    try:
        if not log.exists():
            lines, head, events = 0, "", []
        else:
            # A trainer may be appending: what is verified is what is summed up.
            hashes = verify(log)
            lines, head = len(hashes), hashes[-1].hex() if hashes else ""
            with log.open("rb") as file:
                events = [json.loads(next(file)) for _ in range(lines)]
    except OSError as error:
        raise AuditError(
            f"audit log {log} cannot be read ({error.strerror}); run this as user 10001 or root"
        ) from None
    trained = [event for event in events if event["event"] == "trained"]
    sent = [int(event["bytes_out"]) for event in events if "bytes_out" in event]
    last = events[-1] if events else None
    return Standing(
        lines=lines,
        head=head,
        trained=_name(trained[-1]) if trained else None,
        bytes_sent=sum(sent),
        updates=len(trained),
        refused=sum(event["event"] == "refused" for event in events),
        training=last is not None and last["event"] == "training",
        quiet_seconds=now.timestamp() - last["time"] if last else float("inf"),
    )


def list_standing(
    standing: Standing, state: Path, certificate: Path, now: datetime.datetime
) -> list[str]:
    """The lines of `status`: one figure each.

    Raises:
        ConfigError: the certificate or the newest receipt cannot be read.
    """
    return [
        f"last round: {standing.trained or 'none yet'}",
        f"bytes sent: {standing.bytes_sent} in {standing.updates} updates",
        f"refused instructions: {standing.refused}",
        f"audit log: {standing.lines} lines",
        f"privacy spent: {describe_privacy(state)}",
        f"certificate: {describe_certificate(certificate, now)}",
    ]


def describe_privacy(state: Path) -> str:
    """What the site's cohort has spent over all runs, by its newest receipt.

    Raises:
        ConfigError: the receipt cannot be read.
    """
    if not (state / "ledger.jsonl").exists():
        return "not accounted, for this site has no ledger"
    try:
        lines = (state / "receipts.jsonl").read_text(encoding="utf-8").splitlines()
        if not lines:
            return "nothing yet"
        last = json.loads(lines[-1])["receipt"]
        return (
            f"epsilon {last['epsilon_cohort']:.3g} at delta {last['cohort_delta']:.3g} for each "
            f"{last['unit']} of cohort {last['cohort']}, over all runs"
        )
    except FileNotFoundError:
        return "nothing yet"
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{state / 'receipts.jsonl'} cannot be read; restore it from a backup"
        ) from None


def describe_certificate(path: Path, now: datetime.datetime) -> str:
    """Days left of a certificate, and whether its renewal is due: past two thirds of its life.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        leaf = x509.load_pem_x509_certificates(path.read_bytes())[0]
    except (OSError, ValueError):
        raise ConfigError(
            f"{path} cannot be read as a certificate: take up the coordinator's reply again "
            "(`./site accept REPLY`)"
        ) from None
    start, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    day = f"{end:%Y-%m-%d}"
    if now >= end:
        return f"EXPIRED on {day}; ask the coordinator for a renewal"
    due = ", renewal is due: ask the coordinator" if now >= start + (end - start) * 2 / 3 else ""
    return f"{(end - now).days} days left, until {day}{due}"


def _name(event: dict[str, str | int | float]) -> str:
    """A round as a person reads it."""
    moment = datetime.datetime.fromtimestamp(float(event["time"]), datetime.UTC)
    return f"round {event['round']} of run {event['run']}, {moment:%Y-%m-%d %H:%M:%S} UTC"
