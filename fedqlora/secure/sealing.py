"""Sealing: each site's shares for each other, which travel through the coordinator unread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedqlora import protocol_pb2 as pb
from fedqlora.errors import SecureAggregationError
from fedqlora.secure.keys import Group, derive_seal_key
from fedqlora.secure.shamir import SHARE_BYTES, split

# Each sealing key seals one message, so a fixed nonce never meets it twice.
_NONCE = bytes(12)


def seal(
    site: str, private: X25519PrivateKey, group: Group, seeds: Sequence[bytes]
) -> dict[str, bytes]:
    """Share a site's seeds out to all sites of the round, itself included.

    Args:
        site: whose seeds they are.
        private: its round key.
        group: the round.
        seeds: of its own mask, then of those in common with each other site, in order.

    Returns:
        For each site its shares, which only it can open.
    """
    count = len(group.sites)
    dealt = zip(*(split(seed, group.threshold, count) for seed in seeds), strict=True)
    sealed = {}
    for receiver, shares in zip(group.sites, dealt, strict=True):
        key = derive_seal_key(private, site, receiver, group, sending=True)
        sealed[receiver] = AESGCM(key).encrypt(_NONCE, b"".join(shares), None)
    return sealed


def release(
    site: str,
    private: X25519PrivateKey,
    group: Group,
    alive: Sequence[str],
    sealed: Mapping[str, bytes],
) -> list[pb.Share]:
    """A site's shares for one list of survivors, with nothing checked but that they open.

    Returns:
        For each survivor a share of its own mask, and one of each mask in common with a lost site.

    Raises:
        SecureAggregationError: a survivor's shares are missing, or were not sealed for this site.
    """
    given = []
    survivors = set(alive)
    for sender in alive:
        key = derive_seal_key(private, site, sender, group, sending=False)
        try:
            opened = AESGCM(key).decrypt(_NONCE, sealed.get(sender, b""), None)
        except InvalidTag:
            raise SecureAggregationError(
                "secure_aggregation.shares",
                f"the shares that site {sender} has sealed for site {site} are missing or altered; "
                "send them as they came",
            ) from None
        names = ["", *group.others(sender)]
        for number, peer in enumerate(names):
            if peer not in survivors:
                value = opened[number * SHARE_BYTES : (number + 1) * SHARE_BYTES]
                given.append(pb.Share(site=sender, peer=peer, value=value))
    return given
