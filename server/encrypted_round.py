"""EncryptedRound: a round whose updates arrive encrypted, added up by who cannot read them.

WRAP (key site) -> TRAIN -> ciphertexts -> DECRYPT (key site) -> mean

It takes the place of `server.intake.Intake`, as `server.secure_round.SecureRound` does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import AdapterSpec, check_update
from fedqlora.config import RunConfig
from fedqlora.errors import FederationError, SecureAggregationError, UpdateError
from fedqlora.halves import select_trained
from fedqlora.secure import ckks
from fedqlora.secure.masks import from_bytes
from fedqlora.secure.vector import Scale, unpack, vector_length
from server.aggregation.aggregate import Aggregate
from server.aggregation.method import start_aggregation
from server.checkpoint import Checkpoint
from server.exchange import INVALID, Answer, Exchange
from server.sites import Sites

log = logging.getLogger("server")

_Body = TypeVar("_Body", pb.WrappedKey, pb.Decryption)


class EncryptedRound:
    """One round; the key site makes its key at the start.

    Args:
        config: the run.
        round_: the round.
        before: its starting point.
        addressees: node id -> name of the sites that are asked.
        sites: knows their round keys.
        exchange: how they are asked.

    Raises:
        UpdateError: the run's method cannot aggregate this adapter.
        FederationError: the key site is not there or does not give a key.
    """

    def __init__(
        self,
        config: RunConfig,
        round_: int,
        before: Checkpoint,
        addressees: Mapping[int, str],
        sites: Sites,
        exchange: Exchange,
    ) -> None:
        trained = select_trained(before.adapter, config.aggregation.method, round_)
        self._spec = AdapterSpec.of({name: before.adapter[name] for name in trained})
        self._length = vector_length(self._spec)
        self._sum = ckks.CiphertextSum(-(-self._length // ckks.SLOTS))
        # It sees the mean only, so there are no norms of single updates to hold it to.
        self._aggregator = start_aggregation(
            config, round_, before.adapter, before.residual, before.memory, medians={}
        )
        self._config = config
        self._round = round_
        self._sites = sites
        self._exchange = exchange
        self._holder = str(config.homomorphic_encryption.key_site)
        self._node = {name: node for node, name in addressees.items()}.get(self._holder)
        self._checksums: dict[str, bytes] = {}
        self._bytes = {"opening_bytes_down": 0, "opening_bytes_up": 0}
        self.round_keys = [sites.round_key(name) for name in sorted(addressees.values())]
        body = pb.Wrap(config=config.model_dump_json(), round_keys=self.round_keys)
        self.encryption_key = self._ask(pb.WRAP, body.SerializeToString(), pb.WrappedKey)

    def fold(self, answer: Answer) -> dict[str, Any]:
        """Add one answer's ciphertexts to the sum; returns what is recorded about it."""
        facts: dict[str, Any] = {
            "outcome": answer.failure or "used",
            "bytes_down": answer.sent_bytes,
            "bytes_up": answer.received_bytes,
        }
        update = answer.message
        if not isinstance(update, pb.Update):
            return {**facts, "reason": answer.reason}
        try:
            self._sum.add(answer.site, update.encrypted.ciphertexts)
        except UpdateError as error:
            return {**facts, "outcome": INVALID, "reason": str(error)}
        self._checksums[answer.site] = update.encrypted.checksum
        if answer.site != self._holder:
            self._keep_key(answer.site, update.round_key)
        return facts

    def finish(self) -> Aggregate:
        """The next adapter, from the mean of the deltas that are in the sum.

        Raises:
            FederationError: the key site does not decrypt the sum, or it makes no sense.
        """
        body = pb.Decrypt(
            config=self._config.model_dump_json(),
            alive=sorted(self._checksums),
            ciphertexts=self._sum.ciphertexts(),
            checksums=self._checksums,
        )
        decryption = self._ask(pb.DECRYPT, body.SerializeToString(), pb.Decryption)
        self._keep_key(self._holder, decryption.round_key)
        scale = Scale.of(self._config, len(self.round_keys))
        try:
            if len(decryption.values) < 4 * self._length:
                raise UpdateError("the decrypted sum is too short for the adapter that was sent")
            total = unpack(
                from_bytes(decryption.values), self._spec, scale, survivors=len(self._checksums)
            )
            check_update(total.mean, self._spec, self._config.aggregation.max_update_norm)
        except UpdateError as error:
            raise FederationError(f"round {self._round}: {error}; then resume the run") from error
        self._aggregator.add("all sites", total.mean, 1)
        result = self._aggregator.finish()
        counts = {"examples": total.examples, "tokens": total.tokens}
        return replace(result, figures={**counts, **total.figures, **self._bytes, **result.figures})

    def _ask(self, kind: pb.Kind, payload: bytes, wanted: type[_Body]) -> _Body:
        """One exchange with the key site, without whose answer the round cannot go on."""
        reason = "it is not connected or was left out"
        if self._node is not None:
            seconds = self._config.federation.round_deadline_seconds
            addressees = {self._node: self._holder}
            for answer in self._exchange.ask(addressees, kind, self._round, payload, seconds):
                self._bytes["opening_bytes_down"] += answer.sent_bytes
                self._bytes["opening_bytes_up"] += answer.received_bytes
                if isinstance(answer.message, wanted):
                    return answer.message
                reason = answer.reason
        raise FederationError(
            f"round {self._round} needs site {self._holder}, the key site, to "
            f"{pb.Kind.Name(kind).lower()} ({reason}); mend that site, then resume the run"
        )

    def _keep_key(self, site: str, round_key: pb.RoundKey) -> None:
        """Take a key for the next round; a site without one is asked to describe itself anew."""
        if self._round == self._config.federation.rounds:
            return
        try:
            self._sites.keep_key(site, round_key, self._round + 1)
        except SecureAggregationError as error:
            log.warning("site %s: %s", site, error)
