"""Budget: what a cohort of patients may still give away, and the receipt for what it gave.

check (nothing is opened) -> plan (the records were counted) -> train -> charge -> receipt
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.ledger import LEDGER_FILE, Ledger, Plan
from client.policy import Policy
from fedqlora import protocol_pb2 as pb
from fedqlora.config import RunConfig
from fedqlora.errors import LedgerError, PolicyRefusal, PrivacyError
from fedqlora.privacy.accountant import (
    Spending,
    calibrate_noise,
    default_delta,
    join,
    spent_epsilon,
)
from fedqlora.privacy.receipts import Receipt, sign_receipt


class Budget:
    """A site's account, for one instruction at a time.

    Args:
        site: the site's name.
        state: folder of ledger and receipts.
        policy: the site's rules.
        key: the site's signing key, for receipts.
    """

    def __init__(self, site: str, state: Path, policy: Policy, key: Ed25519PrivateKey) -> None:
        self._site = site
        self._ledger_path = state / LEDGER_FILE
        self._receipts = state / "receipts.jsonl"
        self._policy = policy.privacy
        self._key = key

    def open(self, seen: Mapping[str, str]) -> Ledger:
        """The ledger, verified; `seen` is the instruction's heads by site.

        Raises:
            LedgerError: see `Ledger`.
        """
        return Ledger(self._ledger_path, self._site, self._key, seen.get(self._site, ""))

    def check(self, ledger: Ledger, config: RunConfig, run: str) -> None:
        """Refuse what the budget does not hold; no record is read.

        A run that has not begun is measured whole, by the number of units that the cohort had
        last; `plan` measures it again by the true number.

        Raises:
            PolicyRefusal: the cohort's budget would be exceeded (privacy.epsilon), or its
                earlier runs had another unit (privacy.unit).
            PrivacyError: the run's own promise is spent, or it now asks for something else.
        """
        newest = ledger.newest_plan(self._policy.cohort)
        if newest is None:
            return
        if newest.unit != config.privacy.unit:
            raise PolicyRefusal(
                "privacy.unit",
                f"earlier runs on this cohort had the unit {newest.unit}, which does not add up "
                f"with {config.privacy.unit}; keep to one unit (privacy.unit)",
            )
        plan = ledger.plan(run, self._policy.cohort)
        if plan is None:
            self._afford(ledger, self._make_plan(config, run, newest.units), _all_steps(config))
            return
        if plan.asked != _asked(config):
            raise PrivacyError(
                f"run {run} asks for other privacy or training than at its start; start a new run"
            )
        one = _spending(plan, config.training.steps)
        own = spent_epsilon([*ledger.spent(self._policy.cohort, run), one], plan.delta)
        if own > _promise(config):
            raise PrivacyError(
                f"run {run} has spent its privacy.epsilon = {_promise(config):g} (a round whose "
                "reply was lost counts too); start a new run"
            )
        self._afford(ledger, plan, config.training.steps)

    def plan(self, ledger: Ledger, config: RunConfig, run: str, units: int) -> Plan:
        """How this run trains here: as written down, or worked out and written down now.

        Raises:
            PrivacyError: the promise cannot be met, or the records changed since the start.
            PolicyRefusal: as `check`.
            LedgerError: it cannot be written down.
        """
        known = ledger.plan(run, self._policy.cohort)
        if known is not None:
            if known.units != units:
                raise PrivacyError(
                    f"the site's records changed since run {run} began; start a new run"
                )
            return known
        plan = self._make_plan(config, run, units)
        if self._policy.delta is not None and plan.delta > self._policy.delta:
            raise PolicyRefusal(
                "privacy.delta",
                f"the site's policy allows {self._policy.delta:g}, the run's delta is "
                f"{plan.delta:g} here; set privacy.delta (privacy.delta)",
            )
        self._afford(ledger, plan, _all_steps(config))
        ledger.pin(plan)
        return plan

    def charge(
        self,
        ledger: Ledger,
        plan: Plan,
        config: RunConfig,
        header: pb.Header,
        base_digest: str,
        app_digest: str,
        update: bytes,
    ) -> bytes:
        """Charge a round, then sign and keep its receipt; both are on disk when it returns.

        Args:
            ledger: from `open`.
            plan: from `plan`.
            config: the run.
            header: the instruction's.
            base_digest: of the base model.
            app_digest: of the app, as the instruction claims it.
            update: the content that is to leave.

        Raises:
            LedgerError: ledger or receipts cannot be written, so the update must not leave.
        """
        ledger.charge(plan, header.round, config.training.steps)
        everything = join(ledger.spent(plan.cohort))
        delta = plan.delta if self._policy.delta is None else self._policy.delta
        receipt = Receipt(
            site=self._site,
            run=header.run,
            round=header.round,
            cohort=plan.cohort,
            unit=plan.unit,
            sampling_rate=plan.sampling_rate,
            noise_multiplier=plan.noise_multiplier,
            clip_norm=config.privacy.clip_norm,
            steps=config.training.steps,
            delta=plan.delta,
            epsilon_round=spent_epsilon([_spending(plan, config.training.steps)], plan.delta),
            epsilon_run=spent_epsilon(ledger.spent(plan.cohort, plan.run), plan.delta),
            run_steps=sum(one.steps for one in ledger.spent(plan.cohort, plan.run)),
            cohort_delta=delta,
            epsilon_cohort=spent_epsilon(everything, delta),
            cohort_spent=tuple(
                (one.sampling_rate, one.noise_multiplier, one.steps) for one in everything
            ),
            base_digest=base_digest,
            app_digest=app_digest,
            instruction_digest=hashlib.sha256(
                header.SerializeToString(deterministic=True)
            ).hexdigest(),
            update_digest=hashlib.sha256(update).hexdigest(),
            ledger_head=ledger.head,
        )
        line = sign_receipt(receipt, self._key)
        try:
            with self._receipts.open("ab") as file:
                file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise LedgerError(
                f"receipts {self._receipts} cannot be written ({error.strerror}), so nothing "
                "leaves; free space or correct its owner"
            ) from None
        return line

    def _make_plan(self, config: RunConfig, run: str, units: int) -> Plan:
        expected = config.training.batch_examples
        if expected > units or units < 3:
            raise PrivacyError(
                f"a step's training.batch_examples = {expected} {config.privacy.unit}s are more "
                "than the site has, or it has fewer than three; lower it"
            )
        delta = config.privacy.delta
        if delta is None:
            delta = default_delta(units)
        rate = expected / units
        return Plan(
            run=run,
            cohort=self._policy.cohort,
            unit=config.privacy.unit,
            units=units,
            sampling_rate=rate,
            noise_multiplier=calibrate_noise(_promise(config), delta, rate, _all_steps(config)),
            delta=delta,
            asked=_asked(config),
        )

    def _afford(self, ledger: Ledger, plan: Plan, steps: int) -> None:
        """Refuse steps that would exceed the cohort's budget."""
        if self._policy.epsilon is None or self._policy.delta is None:
            return
        spent = ledger.spent(plan.cohort)
        total = spent_epsilon([*spent, _spending(plan, steps)], self._policy.delta)
        if total > self._policy.epsilon:
            raise PolicyRefusal(
                "privacy.epsilon",
                f"the site's policy allows its patients epsilon {self._policy.epsilon:g} over all "
                f"runs; this would make it {total:.3g} (privacy.epsilon)",
            )


def _spending(plan: Plan, steps: int) -> Spending:
    return Spending(
        sampling_rate=plan.sampling_rate, noise_multiplier=plan.noise_multiplier, steps=steps
    )


def _promise(config: RunConfig) -> float:
    assert config.privacy.epsilon is not None  # noqa: S101 - RunConfig refuses a unit without
    return config.privacy.epsilon


def _all_steps(config: RunConfig) -> int:
    return config.training.steps * config.federation.rounds


def _asked(config: RunConfig) -> str:
    """Digest of everything in a run that its noise follows from."""
    parts = (
        config.privacy.model_dump_json(),
        str(config.training.steps),
        str(config.training.batch_examples),
        str(config.federation.rounds),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
