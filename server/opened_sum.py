"""OpenedSum: what becomes of the sum of a round's updates where no single one is ever open.

`server.secure_round` and `server.encrypted_round` differ in how they come by it, not in this.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import check_update
from fedqlora.config import RunConfig
from fedqlora.errors import FederationError, FedqloraError, SecureAggregationError, UpdateError
from fedqlora.halves import trained_spec
from fedqlora.secure.masks import Ring
from fedqlora.secure.vector import Scale, unpack, vector_length
from server.aggregation.aggregate import Aggregate
from server.aggregation.method import start_aggregation
from server.answer import Answer
from server.checkpoint import Checkpoint
from server.sites import Sites

log = logging.getLogger("server")


class OpenedSum:
    """The sum of one round.

    Args:
        config: the run.
        round_: the round.
        before: its starting point.
        sites: takes their keys for the next round.

    Attributes:
        length: number of values in a site's vector.

    Raises:
        UpdateError: the run's method cannot aggregate this adapter.
    """

    def __init__(self, config: RunConfig, round_: int, before: Checkpoint, sites: Sites) -> None:
        self._spec = trained_spec(before.adapter, config.aggregation.method, round_)
        self.length = vector_length(self._spec)
        # It sees the mean only, so there are no norms of single updates to hold it to.
        self._aggregator = start_aggregation(
            config, round_, before.adapter, before.residual, before.memory, medians={}
        )
        self._config = config
        self._round = round_
        self._sites = sites
        self._bytes = {"opening_bytes_down": 0, "opening_bytes_up": 0}

    def count(self, answer: Answer) -> None:
        """Count the bytes of an exchange beside the updates'."""
        self._bytes["opening_bytes_down"] += answer.sent_bytes
        self._bytes["opening_bytes_up"] += answer.received_bytes

    def keep_key(self, site: str, round_key: pb.RoundKey) -> None:
        """Take a key for the next round; a site without one is asked to describe itself anew."""
        if self._round == self._config.federation.rounds:
            return
        try:
            self._sites.keep_key(site, round_key, self._round + 1)
        except SecureAggregationError as error:
            log.warning("site %s: %s", site, error)

    def finish(self, total: Ring, asked: int, survivors: int) -> Aggregate:
        """The next adapter, from the mean of the deltas in a sum.

        Args:
            total: the sum.
            asked: number of sites in the round.
            survivors: number of them whose update is in it.

        Raises:
            FederationError: the sum makes no sense.
        """
        scale = Scale.of(self._config, asked)
        try:
            opened = unpack(total, self._spec, scale, survivors)
            check_update(opened.mean, self._spec, self._config.aggregation.max_update_norm)
        except UpdateError as error:
            raise self.failure(error) from error
        self._aggregator.add("all sites", opened.mean, 1)
        result = self._aggregator.finish()
        counts = {"examples": opened.examples, "tokens": opened.tokens}
        figures = {**counts, **opened.figures, **self._bytes, **result.figures}
        return replace(result, figures=figures)

    def failure(self, error: FedqloraError) -> FederationError:
        """What a sum that cannot be opened ends the round with."""
        return FederationError(f"round {self._round}: {error}; then resume the run")
