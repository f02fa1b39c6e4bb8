"""SecureRound: a round whose updates arrive masked, and of which only the sum is ever open.

TRAIN -> masked updates -> CONFIRM -> signatures of the survivors -> UNMASK -> shares -> mean

It takes the place of `server.intake.Intake`: answers are folded in, then the round is finished.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec, check_update
from fedqlora.config import RunConfig
from fedqlora.errors import FederationError, SecureAggregationError, UpdateError
from fedqlora.halves import select_trained
from fedqlora.secure.collector import Collector
from fedqlora.secure.keys import Group
from fedqlora.secure.vector import Scale, unpack, vector_length
from server.aggregation.aggregate import Aggregate
from server.aggregation.method import start_aggregation
from server.checkpoint import Checkpoint
from server.exchange import INVALID, Answer, Exchange
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
        trained = select_trained(before.adapter, config.aggregation.method, round_)
        spec = AdapterSpec.of({name: before.adapter[name] for name in trained})
        self.round_keys = [sites.round_key(name) for name in sorted(names)]
        self.encryption_key: pb.WrappedKey | None = None
        keys = {one.site: one.public for one in self.round_keys}
        self._collector = Collector(
            Group(run=exchange.run, round=round_, keys=keys), vector_length(spec)
        )
        # It sees the mean only, so there are no norms of single updates to hold it to.
        self._aggregator = start_aggregation(
            config, round_, before.adapter, before.residual, before.memory, medians={}
        )
        self._config = config
        self._round = round_
        self._spec = spec
        self._sites = sites
        self._exchange = exchange
        self._nodes: dict[str, int] = {}
        self._missing: dict[str, str] = {}
        self._bytes = {"opening_bytes_down": 0, "opening_bytes_up": 0}

    def fold(self, answer: Answer) -> dict[str, Any]:
        """Add one answer's masked update to the sum; returns what is recorded about it."""
        facts: dict[str, Any] = {
            "outcome": answer.failure or "used",
            "bytes_down": answer.sent_bytes,
            "bytes_up": answer.received_bytes,
        }
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
        mean, figures = self._open()
        self._aggregator.add("all sites", mean, 1)
        result = self._aggregator.finish()
        return replace(result, figures={**figures, **result.figures})

    def _open(self) -> tuple[Adapter, Mapping[str, float]]:
        """The mean of the survivors' deltas, and figures of all of them together.

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
        renewed: dict[str, pb.RoundKey] = {}

        def unmasked(site: str, body: pb.Unmasking) -> None:
            collector.take(site, body.shares)
            renewed[site] = body.round_key

        self._ask(signatures, pb.UNMASK, unmask, pb.Unmasking, unmasked)
        self._renew(renewed)
        scale = Scale.of(self._config, len(collector.group.sites))
        try:
            total = unpack(collector.open(), self._spec, scale, len(collector.alive))
            check_update(total.mean, self._spec, self._config.aggregation.max_update_norm)
        except (SecureAggregationError, UpdateError) as error:
            raise FederationError(f"round {self._round}: {error}; then resume the run") from error
        counts = {"examples": total.examples, "tokens": total.tokens}
        return total.mean, {**counts, **total.figures, **self._bytes}

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
            self._bytes["opening_bytes_down"] += answer.sent_bytes
            self._bytes["opening_bytes_up"] += answer.received_bytes
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

    def _renew(self, renewed: Mapping[str, pb.RoundKey]) -> None:
        """Take the keys for the next round; a site without one is asked to describe itself anew."""
        if self._round == self._config.federation.rounds:
            return
        for site, round_key in renewed.items():
            try:
                self._sites.keep_key(site, round_key, self._round + 1)
            except SecureAggregationError as error:
                log.warning("site %s: %s", site, error)

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
