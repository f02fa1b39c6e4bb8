"""SecureRound: a round whose updates arrive masked, and of which only the sum is ever open.

TRAIN -> masked updates -> CONFIRM -> signatures of the survivors -> UNMASK -> shares -> mean

It takes the place of `server.intake.Intake`: answers are folded in, then the round is finished.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from fedqlora import protocol_pb2 as pb
from fedqlora.config import RunConfig
from fedqlora.errors import FederationError, SecureAggregationError, UpdateError
from fedqlora.secure.collector import Collector
from fedqlora.secure.keys import Group
from server.aggregation.aggregate import Aggregate
from server.answer import INVALID, Answer
from server.checkpoint import Checkpoint
from server.exchange import Exchange
from server.opened_sum import OpenedSum
from server.sites import Sites

log = logging.getLogger("server")

_Body = TypeVar("_Body", pb.Confirmation, pb.Unmasking)


class SecureRound:
    """One round; a site whose update is in the sum may be lost afterwards.

    Args:
        config: the run.
        round_: the round.
        before: its starting point.
        names: the sites that are asked.
        sites: knows their round keys.
        exchange: how they are asked.

    Raises:
        UpdateError: the run's method cannot aggregate this adapter.
    """

    def __init__(
        self,
        config: RunConfig,
        round_: int,
        before: Checkpoint,
        names: Iterable[str],
        sites: Sites,
        exchange: Exchange,
    ) -> None:
        self._sum = OpenedSum(config, round_, before, sites)
        self.round_keys = [sites.round_key(name) for name in sorted(names)]
        self.encryption_key: pb.WrappedKey | None = None
        keys = {one.site: one.public for one in self.round_keys}
        self._collector = Collector(
            Group(run=exchange.run, round=round_, keys=keys), self._sum.length
        )
        self._config = config
        self._round = round_
        self._exchange = exchange
        self._nodes: dict[str, int] = {}
        self._missing: dict[str, str] = {}

    def fold(self, answer: Answer) -> dict[str, Any]:
        """Add one answer's masked update to the sum; returns what is recorded about it."""
        facts = answer.facts
        if not isinstance(answer.message, pb.Update):
            self._missing[answer.site] = answer.reason
            return {**facts, "reason": answer.reason}
        try:
            self._collector.add(answer.site, answer.message.masked)
        except UpdateError as error:
            self._missing[answer.site] = str(error)
            return {**facts, "outcome": INVALID, "reason": str(error)}
        self._nodes[answer.site] = answer.node
        return facts

    def finish(self) -> Aggregate:
        """The next adapter, from the mean of the survivors' deltas.

        Raises:
            FederationError: too few survivors are left to open the sum, or it makes no sense.
        """
        collector, config = self._collector, self._config.model_dump_json()
        self._check_count(len(collector.alive), "sent a masked update")
        confirm = pb.Confirm(config=config, alive=collector.alive).SerializeToString()
        signatures: dict[str, bytes] = {}

        def confirmed(site: str, body: pb.Confirmation) -> None:
            key = self._exchange.key_of(site)
            collector.check_confirmation(site, body.signature, key)
            signatures[site] = body.signature

        self._ask(collector.alive, pb.CONFIRM, confirm, pb.Confirmation, confirmed)
        self._check_count(len(signatures), "confirmed the list of survivors")
        unmask = {
            site: pb.Unmask(
                config=config, signatures=signatures, sealed=collector.sealed_for(site)
            ).SerializeToString()
            for site in signatures
        }

        def unmasked(site: str, body: pb.Unmasking) -> None:
            collector.take(site, body.shares)
            self._sum.keep_key(site, body.round_key)

        self._ask(signatures, pb.UNMASK, unmask, pb.Unmasking, unmasked)
        try:
            total = collector.open()
        except SecureAggregationError as error:
            raise self._sum.failure(error) from error
        return self._sum.finish(total, len(collector.group.sites), len(collector.alive))

    def _ask(
        self,
        names: Iterable[str],
        kind: pb.Kind,
        payload: bytes | Mapping[str, bytes],
        wanted: type[_Body],
        take: Callable[[str, _Body], None],
    ) -> None:
        """One short exchange with some survivors; who does not answer well is named and missed."""
        addressees = {self._nodes[name]: name for name in names}
        seconds = self._config.secure_aggregation.answer_seconds
        for answer in self._exchange.ask(addressees, kind, self._round, payload, seconds):
            self._sum.count(answer)
            reason = answer.reason
            if isinstance(answer.message, wanted):
                try:
                    take(answer.site, answer.message)
                except UpdateError as error:
                    reason = str(error)
            if reason:
                self._missing[answer.site] = reason
                step = pb.Kind.Name(kind).lower()
                log.warning("round %s: %s of %s: %s", self._round, step, answer.site, reason)

    def _check_count(self, count: int, did: str) -> None:
        """Refuse to go on without a threshold of sites."""
        group = self._collector.group
        if count < group.threshold:
            why = "; ".join(f"{site}: {reason}" for site, reason in sorted(self._missing.items()))
            raise FederationError(
                f"round {self._round}: {count} of {len(group.sites)} sites {did}, and "
                f"{group.threshold} have to, for a sum to be opened ({why}); mend the missing "
                "sites, then resume the run"
            )
