"""Ledger: the privacy that each patient cohort of a site has spent, over all runs ever.

Append-only, hash-chained JSON lines (fedqlora/audit.py), on disk before an update leaves.

Guarantees, each restated in tests/client/test_private.py:

- A missing ledger is never taken for an empty one: a trainer makes none, only `make_ledger`, which
  belongs to a site's first start, and it does not where the audit log shows that there was one.
- A damaged ledger, another site's, or one older than the head that the coordinator has seen is
  refused.
- A line cut off by a crash is dropped: it was being written, so its update had not left.

Edge cases: a round that was carried out twice because its first reply never left is charged
twice, as its noise was fresh each time.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedqlora.audit import AuditLog
from fedqlora.errors import AuditError, HistoryError, LedgerError
from fedqlora.privacy.accountant import Spending

LEDGER_FILE = "ledger.jsonl"
"""The ledger's name in the trainer's state folder."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run trains on a cohort, fixed before its first round.

    Attributes:
        run: the run's name.
        cohort: whose records.
        unit: `example` or `patient`.
        units: how many there are.
        sampling_rate: probability with which each enters a step.
        noise_multiplier: noise over clip norm.
        delta: of the run's promise.
        asked: digest of what the run asked for, so that it cannot ask for something else later.
    """

    run: str
    cohort: str
    unit: str
    units: int
    sampling_rate: float
    noise_multiplier: float
    delta: float
    asked: str


class Ledger:
    """An open ledger.

    Args:
        path: the file, which must exist.
        site: whose it must be.
        key: the site's signing key.
        seen: head that the coordinator saw last; empty where it has seen none.

    Raises:
        LedgerError: it is lost, damaged, another site's or older than `seen`.
    """

    def __init__(self, path: Path, site: str, key: Ed25519PrivateKey, seen: str = "") -> None:
        if not path.is_file():
            raise LedgerError(
                f"ledger {path} is missing, so what the patients gave away is not known; restore "
                "it from a backup, or on a first start run `python -m client ledger init`"
            )
        try:
            self._log = AuditLog(path, key)
        except AuditError:
            raise LedgerError(
                f"ledger {path} does not fit its chain; restore a good copy from a backup"
            ) from None
        self._lines = [json.loads(line) for line in path.read_text().splitlines()]
        if not self._lines or self._lines[0].get("site") != site:
            raise LedgerError(
                f"ledger {path} is not site {site}'s; put back the one that this site wrote"
            )
        if seen and seen not in {line["hash"] for line in self._lines}:
            raise LedgerError(
                f"ledger {path} is older than the one that the coordinator saw last; restore the "
                "newest copy"
            )

    @property
    def head(self) -> str:
        """Hash of the newest line."""
        return self._log.head.digest.hex()

    def plan(self, run: str, cohort: str) -> Plan | None:
        """The plan of a run, if it was made."""
        return next((plan for plan in self._plans(cohort) if plan.run == run), None)

    def newest_plan(self, cohort: str) -> Plan | None:
        """The plan that was made last for a cohort."""
        return next(reversed(self._plans(cohort)), None)

    def spent(self, cohort: str, run: str | None = None) -> tuple[Spending, ...]:
        """What a cohort has spent, in all runs or in one."""
        return tuple(
            Spending(
                sampling_rate=line["sampling_rate"],
                noise_multiplier=line["noise_multiplier"],
                steps=line["steps"],
            )
            for line in self._lines
            if line["event"] == "spent"
            and line["cohort"] == cohort
            and (run is None or line["run"] == run)
        )

    def pin(self, plan: Plan) -> None:
        """Write a run's plan down.

        Raises:
            LedgerError: it cannot be written.
        """
        self._append("planned", **asdict(plan))

    def charge(self, plan: Plan, round_: int, steps: int) -> None:
        """Write down what a round spent; on disk when it returns.

        Raises:
            LedgerError: it cannot be written, so the update must not leave.
        """
        self._append("spent", **asdict(plan), round=round_, steps=steps)

    def _plans(self, cohort: str) -> list[Plan]:
        names = Plan.__dataclass_fields__
        return [
            Plan(**{name: line[name] for name in names})
            for line in self._lines
            if line["event"] == "planned" and line["cohort"] == cohort
        ]

    def _append(self, event: str, **facts: str | int | float) -> None:
        known = self._log.head
        try:
            self._log.append_after(known, event, **facts)
        except HistoryError:
            raise LedgerError(
                "somebody else has written to the ledger since this round began, so what it may "
                "still spend is not known and nothing leaves; run one trainer of this site only"
            ) from None
        except AuditError:
            raise LedgerError(
                "the ledger cannot be written, so nothing leaves; free space or correct its owner"
            ) from None
        self._lines.append({"event": event, "hash": self.head, **facts})


def make_ledger(site: str, state: Path, key: Ed25519PrivateKey) -> bool:
    """Make the ledger of a site that never trained privately; one that is there stays as it is.

    Args:
        site: whose it is.
        state: the trainer's folder. The audit log in it remembers whether there was a ledger.
        key: the site's signing key.

    Returns:
        Whether it was made.

    Raises:
        LedgerError: there was one, and it is gone; or it cannot be written.
    """
    path, audit = state / LEDGER_FILE, state / "audit.jsonl"
    try:
        # An empty one is what a crash left of the first attempt.
        if path.is_file() and path.stat().st_size > 0:
            return False
        if audit.is_file() and '"ledger_head"' in audit.read_text():
            raise LedgerError(
                f"{audit} shows that this site had a ledger; restore it from a backup instead of "
                "starting at zero"
            )
        # Salted: heads go to the coordinator, which could guess the lines behind them.
        AuditLog(path, key).append("opened", site=site, salt=secrets.token_hex(16))
    except (AuditError, OSError):
        raise LedgerError(f"ledger {path} cannot be written; correct its folder") from None
    return True
