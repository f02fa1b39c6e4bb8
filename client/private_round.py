"""PrivateRound: a site's part in a run with `privacy.unit`, from its account to a receipt.

begin (nothing is opened) -> plan (the records were counted) -> train -> charge

Nothing of a private round leaves but its update, which is post-processing of clipped, noised
steps: what the coordinator makes of updates, and sends back to lie frozen beside the adapter, costs
nothing more.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.budget import Budget
from client.examples import Examples
from client.ledger import Ledger, Plan
from client.policy import Policy
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter
from fedqlora.config import RunConfig
from fedqlora.engine.dp import Unit, group_units, train_privately
from fedqlora.engine.model import BaseModel
from fedqlora.halves import trained_spec
from fedqlora.update import read_content

log = logging.getLogger("client")


class Private:
    """The account of one site.

    Args:
        site: the site's name.
        state: folder of ledger and receipts.
        policy: the site's rules.
        key: the site's signing key.
    """

    def __init__(self, site: str, state: Path, policy: Policy, key: Ed25519PrivateKey) -> None:
        self._budget = Budget(site, state, policy, key)

    def begin(
        self, header: pb.Header, config: RunConfig, heads: Mapping[str, str]
    ) -> Ledger | None:
        """Open the ledger and refuse what the budget does not hold, before any record is read.

        Returns:
            None in a run that promises nothing.

        Raises:
            LedgerError: see Budget.open.
            PolicyRefusal, PrivacyError: see Budget.check.
        """
        if config.privacy.unit == "none":
            return None
        ledger = self._budget.open(heads)
        self._budget.check(ledger, config, header.run)
        return ledger

    def plan(
        self,
        ledger: Ledger,
        header: pb.Header,
        config: RunConfig,
        data: Examples,
        base_digest: str,
        app_digest: str,
    ) -> PrivateRound:
        """Count the units, and settle the run's noise if this is its first instruction.

        Args:
            ledger: from `begin`.
            header: the instruction's.
            config: the run.
            data: the site's records.
            base_digest: of the base model, for the receipt.
            app_digest: of the app, as the instruction claims it, for the receipt.

        Raises:
            DataError: see dp.group_units.
            PrivacyError, PolicyRefusal, LedgerError: see Budget.plan.
        """
        settings = config.privacy
        units = group_units(
            data.training, data.patients, settings.unit, settings.max_examples_per_patient
        )
        plan = self._budget.plan(ledger, config, header.run, len(units))
        return PrivateRound(self._budget, ledger, plan, units, base_digest, app_digest)


@dataclass(frozen=True)
class PrivateRound:
    """One instruction of a private run, with everything that it needs beside a plain one."""

    _budget: Budget
    _ledger: Ledger
    _plan: Plan
    _units: list[Unit]
    _base_digest: str
    _app_digest: str

    @property
    def ledger_head(self) -> str:
        """Where the ledger stands."""
        return self._ledger.head

    def train(
        self,
        base: BaseModel,
        adapter: Adapter,
        residual: Adapter,
        config: RunConfig,
        header: pb.Header,
    ) -> Adapter:
        """The delta of what trains in this round, with its noise.

        Raises:
            PrivacyError: see dp.train_privately.
        """
        result = train_privately(
            base,
            adapter,
            self._units,
            config.training,
            clip_norm=config.privacy.clip_norm,
            noise_multiplier=self._plan.noise_multiplier,
            sampling_rate=self._plan.sampling_rate,
            round_=header.round,
            rounds=config.federation.rounds,
            residual=residual,
            trained=trained_spec(adapter, config.aggregation.method, header.round).names,
        )
        log.info("round %s: %s private steps", header.round, config.training.steps)
        return result.delta

    def charge(self, config: RunConfig, header: pb.Header, update: pb.Update) -> None:
        """Charge the round, and put receipt and head into its update: only then may that leave.

        Raises:
            LedgerError: see Budget.charge.
        """
        update.receipt = self._budget.charge(
            self._ledger,
            self._plan,
            config,
            header,
            self._base_digest,
            self._app_digest,
            read_content(update),
        )
        update.ledger_head = self._ledger.head
