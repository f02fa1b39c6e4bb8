"""EncryptedRound: a round whose updates arrive encrypted, added up by who cannot read them.

WRAP (key site) -> TRAIN -> ciphertexts -> DECRYPT (key site) -> mean

It takes the place of `server.intake.Intake`, as `server.secure_round.SecureRound` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fedqlora import protocol_pb2 as pb
from fedqlora.config import RunConfig
from fedqlora.errors import FederationError, UpdateError
from fedqlora.secure import ckks
from fedqlora.secure.masks import from_bytes
from server.aggregation.aggregate import Aggregate
from server.answer import INVALID, Answer
from server.checkpoint import Checkpoint
from server.exchange import Exchange
from server.opened_sum import OpenedSum
from server.sites import Sites

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
        self._sum = OpenedSum(config, round_, before, sites)
        self._ciphertexts = ckks.CiphertextSum(-(-self._sum.length // ckks.SLOTS))
        self._config = config
        self._round = round_
        self._exchange = exchange
        self._holder = str(config.homomorphic_encryption.key_site)
        self._node = {name: node for node, name in addressees.items()}.get(self._holder)
        self._checksums: dict[str, bytes] = {}
        self.round_keys = [sites.round_key(name) for name in sorted(addressees.values())]
        body = pb.Wrap(config=config.model_dump_json(), round_keys=self.round_keys)
        self.encryption_key = self._ask(pb.WRAP, body.SerializeToString(), pb.WrappedKey)

    def fold(self, answer: Answer) -> dict[str, Any]:
        """Add one answer's ciphertexts to the sum; returns what is recorded about it."""
        facts = answer.facts
        update = answer.message
        if not isinstance(update, pb.Update):
            return {**facts, "reason": answer.reason}
        try:
            self._ciphertexts.add(answer.site, update.encrypted.ciphertexts)
        except UpdateError as error:
            return {**facts, "outcome": INVALID, "reason": str(error)}
        self._checksums[answer.site] = update.encrypted.checksum
        if answer.site != self._holder:
            self._sum.keep_key(answer.site, update.round_key)
        return facts

    def finish(self) -> Aggregate:
        """The next adapter, from the mean of the deltas that are in the sum.

        Raises:
            FederationError: the key site does not decrypt the sum, or it makes no sense.
        """
        body = pb.Decrypt(
            config=self._config.model_dump_json(),
            alive=sorted(self._checksums),
            ciphertexts=self._ciphertexts.ciphertexts(),
            checksums=self._checksums,
        )
        decryption = self._ask(pb.DECRYPT, body.SerializeToString(), pb.Decryption)
        self._sum.keep_key(self._holder, decryption.round_key)
        if len(decryption.values) < 4 * self._sum.length:
            error = UpdateError("the decrypted sum is too short for the adapter that was sent")
            raise self._sum.failure(error)
        total = from_bytes(decryption.values)
        return self._sum.finish(total, len(self.round_keys), len(self._checksums))

    def _ask(self, kind: pb.Kind, payload: bytes, wanted: type[_Body]) -> _Body:
        """One exchange with the key site, without whose answer the round cannot go on."""
        reason = "it is not connected or was left out"
        if self._node is not None:
            seconds = self._config.federation.round_deadline_seconds
            addressees = {self._node: self._holder}
            for answer in self._exchange.ask(addressees, kind, self._round, payload, seconds):
                self._sum.count(answer)
                if isinstance(answer.message, wanted):
                    return answer.message
                reason = answer.reason
        raise FederationError(
            f"round {self._round} needs site {self._holder}, the key site, to "
            f"{pb.Kind.Name(kind).lower()} ({reason}); mend that site, then resume the run"
        )
