"""Collector: the coordinator's part in one round of secure aggregation.

It adds masked vectors up as they come, and takes the masks off their sum with the sites' shares.
What it can learn by leaving this file is limited by participant.py alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedqlora import protocol_pb2 as pb
from fedqlora.errors import SecureAggregationError, UpdateError
from fedqlora.secure.keys import Group
from fedqlora.secure.masks import Ring, add_mask, from_bytes, remove_mask
from fedqlora.secure.shamir import SHARE_BYTES, Combiner


class Collector:
    """Collects one round; one vector in memory, whatever the number of sites.

    Args:
        group: the sites of the round.
        length: number of values in a vector.
    """

    def __init__(self, group: Group, length: int) -> None:
        self.group = group
        self._total: Ring = np.zeros(length, dtype=np.uint32)
        self._sealed: dict[str, Mapping[str, bytes]] = {}
        self._shares: dict[str, dict[tuple[str, str], bytes]] = {}

    @property
    def alive(self) -> tuple[str, ...]:
        """The sites whose vectors are in the sum, sorted."""
        return tuple(sorted(self._sealed))

    def add(self, site: str, masked: pb.Masked) -> None:
        """Add a site's masked vector.

        Raises:
            UpdateError: it has another length, or does not bring shares for all sites of the round;
                nothing of it was taken.
        """
        if len(masked.values) != 4 * self._total.size or set(masked.sealed) != set(self.group.keys):
            raise UpdateError(
                f"site {site}'s masked update does not have {self._total.size} values and shares "
                "for all sites of the round; train the adapter that was sent"
            )
        self._total += from_bytes(masked.values)
        self._sealed[site] = dict(masked.sealed)

    def check_confirmation(self, site: str, signature: bytes, key: Ed25519PublicKey) -> None:
        """Refuse a signature that would make honest sites refuse to unmask.

        Raises:
            UpdateError: it is not of this round's list of survivors.
        """
        try:
            key.verify(signature, self.group.alive_statement(self.alive))
        except InvalidSignature:
            raise UpdateError(
                f"site {site} has not signed this round's list of survivors"
            ) from None

    def sealed_for(self, site: str) -> dict[str, bytes]:
        """The shares that the survivors have sealed for one of them."""
        return {sender: self._sealed[sender][site] for sender in self.alive}

    def take(self, site: str, shares: Sequence[pb.Share]) -> None:
        """Take one site's shares.

        Raises:
            UpdateError: they are not those that open this round's sum.
        """
        found = {(one.site, one.peer): one.value for one in shares}
        if set(found) != set(self._wanted()) or any(
            len(value) != SHARE_BYTES for value in found.values()
        ):
            raise UpdateError(f"site {site}'s shares are not those of this round's survivors")
        self._shares[site] = found

    def open(self) -> Ring:
        """The sum of the survivors' vectors, with all masks off.

        Raises:
            SecureAggregationError: fewer than a threshold of sites gave shares, or they do not
                belong together.
        """
        givers = sorted(self._shares)[: self.group.threshold]
        if len(givers) < self.group.threshold:
            raise SecureAggregationError(
                "secure_aggregation.shares",
                f"{len(givers)} sites gave their shares and {self.group.threshold} of "
                f"{len(self.group.sites)} have to; the sum stays closed",
            )
        numbers = {site: self.group.sites.index(site) + 1 for site in givers}
        combiner = Combiner(list(numbers.values()))
        for site, peer in self._wanted():
            shares = {numbers[giver]: self._shares[giver][site, peer] for giver in givers}
            try:
                seed = combiner.combine(shares)
            except ValueError:
                raise SecureAggregationError(
                    "secure_aggregation.shares",
                    f"the shares of site {site} do not belong together, so a site has given a "
                    "wrong one; the sum stays closed",
                ) from None
            # Off comes what participant.mask has put on.
            added = not peer or site < peer
            (remove_mask if added else add_mask)(self._total, seed)
        return self._total

    def _wanted(self) -> list[tuple[str, str]]:
        """Whose secrets open the sum: each survivor's own mask, and those in common with a lost."""
        lost = [site for site in self.group.sites if site not in self._sealed]
        return [(site, peer) for site in self.alive for peer in ("", *lost)]
