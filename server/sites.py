"""Sites: which connected node is which site, and whether all of them describe one model.

A node proves its name by signing its description with that site's key. Sites whose base
model or adapter differ cannot be averaged: in round 0 that ends the run with the names of
who has what; a site that joins later and differs is left out and named.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec
from fedqlora.codec import decode
from fedqlora.config import RunConfig
from fedqlora.envelope import ANY_SITE
from fedqlora.errors import FederationError, SecureAggregationError
from fedqlora.secure.keys import verify_round_key
from server.answer import LOST
from server.exchange import Exchange
from server.metrics import Metrics
from server.receipts import Receipts

log = logging.getLogger("server")

_POLL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a site said of itself, as far as sites have to agree."""

    base_digest: str
    family: str
    spec: AdapterSpec


class Sites:
    """The sites of a run.

    Args:
        config: the run.
        exchange: how nodes are asked.
        metrics: where joins are recorded.
        registered: number of sites in the roster.
        agreed: what earlier rounds of this run were based on; None in a new run.
        receipts: what sites said about the privacy that they spent.

    Attributes:
        expected: how many sites the run counts on.
    """

    def __init__(
        self,
        config: RunConfig,
        exchange: Exchange,
        metrics: Metrics,
        registered: int,
        agreed: Described | None,
        receipts: Receipts,
    ) -> None:
        self.receipts = receipts
        self._round_keys: dict[str, tuple[int, pb.RoundKey]] = {}
        self._config = config
        self._exchange = exchange
        self._metrics = metrics
        self.expected = config.federation.expected_sites or max(
            registered, config.federation.min_sites
        )
        self._agreed = agreed
        self._given: Adapter = {}
        self._nodes: dict[str, int] = {}
        self._asked: set[int] = set()
        self._problems: dict[str, str] = {}

    @property
    def agreed(self) -> Described:
        """What all sites of the run share; known once `gather` has returned."""
        if self._agreed is None:
            raise FederationError("no site has described itself yet; gather sites first")
        return self._agreed

    @property
    def given(self) -> Adapter:
        """Starting values of tensors that are neither A nor B."""
        return self._given

    def gather(self, round_: int) -> None:
        """Wait for the sites that a run starts with.

        Args:
            round_: the first round that they take part in.

        Raises:
            FederationError: fewer than `min_sites` are usable after `wait_seconds`, or the
                sites disagree.
        """
        self._wait(self.expected, round_)

    def online(self, round_: int) -> dict[int, str]:
        """Usable sites that are connected now: node id -> name.

        New nodes are described first; with fewer than `min_sites` it waits for more.

        Args:
            round_: the round that they are wanted for.

        Raises:
            FederationError: still fewer after `wait_seconds`.
        """
        return self._wait(self._config.federation.min_sites, round_)

    def keep_key(self, site: str, round_key: pb.RoundKey, round_: int) -> None:
        """Take a site's key for a round of which the sum alone is open.

        Raises:
            SecureAggregationError: it is not signed by that site for that round.
        """
        verify_round_key(
            round_key, self._exchange.key_of(site), run=self._exchange.run, round_=round_
        )
        self._round_keys[site] = (round_, round_key)

    def round_key(self, site: str) -> pb.RoundKey:
        """The key of a site that `online` has named, for that round."""
        return self._round_keys[site][1]

    def _forget_old_keys(self, round_: int) -> None:
        """Sites whose key is for another round are described anew, which brings a fresh one."""
        for site, (of, _) in list(self._round_keys.items()):
            if of != round_:
                del self._round_keys[site]
                self._asked.discard(self._nodes.pop(site))

    def _wait(self, wanted: int, round_: int) -> dict[int, str]:
        settings = self._config.federation
        self._forget_old_keys(round_)
        deadline = time.monotonic() + settings.wait_seconds
        waiting = False
        while True:
            connected = self._exchange.nodes()
            unknown = connected - self._asked
            self._describe(unknown, max(1.0, deadline - time.monotonic()), round_)
            usable = {node: site for site, node in self._nodes.items() if node in connected}
            # Nobody else can come: waiting would not help.
            complete = len(connected) >= self.expected and connected <= self._asked
            late = complete or time.monotonic() > deadline
            if len(usable) >= wanted or (late and len(usable) >= settings.min_sites):
                return usable
            if late:
                problems = "; ".join(f"{who}: {why}" for who, why in self._problems.items())
                raise FederationError(
                    f"{len(usable)} of at least {settings.min_sites} sites are usable "
                    f"({problems or 'no other site is connected'}); mend or start the missing "
                    "sites, then resume the run"
                )
            if not waiting:
                log.info("waiting for sites: %s of %s are here", len(usable), wanted)
                waiting = True
            time.sleep(_POLL_SECONDS)

    def _describe(self, nodes: set[int], deadline_seconds: float, round_: int) -> None:
        """Ask unknown nodes who they are and what they hold."""
        if not nodes:
            return
        body = pb.Describe(
            config=self._config.model_dump_json(),
            ledger_heads=self.receipts.heads(),
            next_round=round_,
            app_digest=self._exchange.app,
        ).SerializeToString()
        addressees = dict.fromkeys(sorted(nodes), ANY_SITE)
        found: dict[str, tuple[int, Described, pb.Description]] = {}
        for answer in self._exchange.ask(addressees, pb.DESCRIBE, 0, body, deadline_seconds):
            # A node whose trainer is still starting is asked again. One that said no is not,
            # nor one that hangs: it would hold up every round.
            if answer.failure != LOST:
                self._asked.add(answer.node)
            if not isinstance(answer.message, pb.Description):
                who = answer.site if answer.site != ANY_SITE else f"node {answer.node}"
                if self._problems.get(who) != answer.reason:
                    log.warning("%s cannot take part: %s", who, answer.reason)
                    self._metrics.append("unusable", site=who, reason=answer.reason)
                self._problems[who] = answer.reason
                continue
            said = answer.message
            self.receipts.keep_head(answer.site, said.ledger_head)
            shapes = tuple((tensor.name, tuple(tensor.shape)) for tensor in said.tensors)
            described = Described(
                base_digest=said.base_digest, family=said.family, spec=AdapterSpec(shapes=shapes)
            )
            found[answer.site] = (answer.node, described, said)
        if self._agreed is None and found:
            self._agreed = _agree({site: said for site, (_, said, _) in found.items()})
            self._given = decode(next(iter(found.values()))[2].given)
        for site, (node, described, said) in sorted(found.items()):
            if described != self._agreed:
                self._problems[site] = "its base model or adapter differs from the run's"
                log.warning("site %s cannot take part: %s", site, self._problems[site])
                self._metrics.append("unusable", site=site, reason=self._problems[site])
                continue
            if self._config.sums_only:
                try:
                    self.keep_key(site, said.round_key, round_)
                except SecureAggregationError as error:
                    self._problems[site] = str(error)
                    log.warning("site %s cannot take part: %s", site, error)
                    self._metrics.append("unusable", site=site, reason=str(error))
                    continue
            self._problems.pop(site, None)
            self._nodes[site] = node
            self._metrics.append("joined", site=site, software=dict(said.software))
            log.info("site %s joined", site)


def _agree(described: Mapping[str, Described]) -> Described:
    """The one description that all give.

    Raises:
        FederationError: names the sites of each base model or adapter.
    """
    groups: dict[Described, list[str]] = {}
    for site, said in described.items():
        groups.setdefault(said, []).append(site)
    if len(groups) > 1:
        lines = "; ".join(
            f"{', '.join(sorted(sites))}: base {said.base_digest[:16]}, "
            f"{said.spec.parameters} adapter parameters ({said.spec.digest()[:8]})"
            for said, sites in groups.items()
        )
        raise FederationError(
            f"the sites do not have the same base model and adapter ({lines}); "
            "give every site the same model files and release"
        )
    return next(iter(groups))
