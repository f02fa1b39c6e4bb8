"""Keys of one round: fresh X25519 keys that sites sign, and what two sites derive from theirs.

Guarantees, each restated by a test in tests/fedqlora/secure:

- A round key counts only under the signing key that the verifier has pinned, and for one run,
  round and site.
- What two sites derive is theirs alone, and depends on run, round, pair, direction and on the
  keys of all sites of the round: whoever is shown another list derives other secrets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedqlora import protocol_pb2 as pb
from fedqlora.errors import SecureAggregationError

SEED_BYTES = 16
"""Of a mask: an AES-128 key, as strong as X25519."""

MOST_SITES = 50
"""Every site has a mask in common with every other."""

_KEY = b"fedqlora secagg key v1"
_GROUP = b"fedqlora secagg group v1"
_ALIVE = b"fedqlora secagg alive v1"
_MASK = b"fedqlora secagg mask v1"
_SEAL = b"fedqlora secagg seal v1"


@dataclass(frozen=True, kw_only=True)
class Group:
    """The sites of one round and their round keys.

    Attributes:
        run: the run's name.
        round: the round.
        keys: each site's X25519 public key (32 bytes), by name.
    """

    run: str
    round: int
    keys: Mapping[str, bytes]

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Names in the order in which shares are numbered."""
        return tuple(sorted(self.keys))

    @property
    def threshold(self) -> int:
        """How many shares open a secret: more than two thirds of the sites.

        Then any two sets of so many sites have more than a third of all in common, so that fewer
        than a third of dishonest ones cannot have two lists of survivors signed.
        """
        return 2 * len(self.keys) // 3 + 1

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over run, round, names and keys."""
        parts = [part for site in self.sites for part in (site.encode(), self.keys[site])]
        return hashlib.sha256(_bind(_GROUP, *_place(self.run, self.round), *parts)).digest()

    def others(self, site: str) -> list[str]:
        """All sites but one, in order."""
        return [other for other in self.sites if other != site]

    def alive_statement(self, alive: tuple[str, ...]) -> bytes:
        """The bytes that a site signs to confirm a list of survivors."""
        return _bind(_ALIVE, self.digest, *(site.encode() for site in alive))


def sign_round_key(
    key: Ed25519PrivateKey, *, run: str, round_: int, site: str, public: bytes
) -> pb.RoundKey:
    """A round key as it travels.

    Args:
        key: the site's signing key.
        run: the run's name.
        round_: the only round that the key is for.
        site: its owner.
        public: the X25519 public key.
    """
    statement = _bind(_KEY, *_place(run, round_), site.encode(), public)
    return pb.RoundKey(site=site, public=public, signature=key.sign(statement))


def verify_round_key(
    round_key: pb.RoundKey, key: Ed25519PublicKey, *, run: str, round_: int
) -> bytes:
    """The X25519 public key, once its signature was checked.

    Args:
        round_key: as it travelled.
        key: the signing key that its owner is known by.
        run: the run at hand.
        round_: the round at hand.

    Raises:
        SecureAggregationError: it is not signed by `key` for this run, round and site.
    """
    site, public = round_key.site, round_key.public
    statement = _bind(_KEY, *_place(run, round_), site.encode(), public)
    try:
        key.verify(round_key.signature, statement)
    except InvalidSignature:
        raise SecureAggregationError(
            "secure_aggregation.keys",
            f"the key of site {site} for round {round_} is not signed by that site for this run "
            "and round; find out who changed it",
        ) from None
    return public


def check_group(
    round_keys: Sequence[pb.RoundKey],
    known: Mapping[str, Ed25519PublicKey],
    *,
    run: str,
    round_: int,
    site: str,
    own: bytes,
    least: int,
) -> Group:
    """The sites of a round, once every key was checked; no data is needed.

    Args:
        round_keys: as they travelled.
        known: the signing keys that `site` has pinned, its own included.
        run: the run at hand.
        round_: the round at hand.
        site: who checks.
        own: its present X25519 public key.
        least: fewest sites that it takes part with, itself included.

    Raises:
        SecureAggregationError: a site is not pinned, a key is not its owner's for this round, or
            the sites are too few or too many.
    """
    keys: dict[str, bytes] = {}
    for one in round_keys:
        if one.site not in known:
            raise SecureAggregationError(
                "secure_aggregation.peers",
                f"the policy of site {site} pins no key of site {one.site[:40]}, with which its "
                "update would be summed; pin it under [peers], or leave that site out",
            )
        keys[one.site] = verify_round_key(one, known[one.site], run=run, round_=round_)
    if keys.get(site) != own or len(keys) != len(round_keys):
        raise SecureAggregationError(
            "secure_aggregation.keys",
            f"the round's keys name site {site} with another key than its present one, or a site "
            "twice; ask it for a new key",
        )
    if not least <= len(keys) <= MOST_SITES:
        raise SecureAggregationError(
            "secure_aggregation.sites",
            f"a sum of {len(keys)} sites is asked for and site {site} takes part in one of "
            f"{least} to {MOST_SITES}",
        )
    return Group(run=run, round=round_, keys=keys)


def derive_mask_seed(private: X25519PrivateKey, own: str, peer: str, group: Group) -> bytes:
    """The seed of the mask that two sites have in common; both derive the same 16 bytes."""
    first, second = sorted((own, peer))
    return _derive(private, peer, group, SEED_BYTES, _MASK, first, second)


def derive_seal_key(
    private: X25519PrivateKey, own: str, peer: str, group: Group, *, sending: bool
) -> bytes:
    """The 32-byte key under which one site's shares travel to another; one for each direction."""
    sender, receiver = (own, peer) if sending else (peer, own)
    return _derive(private, peer, group, 32, _SEAL, sender, receiver)


def _derive(
    private: X25519PrivateKey, peer: str, group: Group, size: int, use: bytes, *names: str
) -> bytes:
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(group.keys[peer]))
    except ValueError:
        raise SecureAggregationError(
            "secure_aggregation.keys",
            f"the round key of site {peer} is no X25519 key; leave that site out",
        ) from None
    info = _bind(use, *_place(group.run, group.round), *(name.encode() for name in names))
    return HKDF(algorithm=SHA256(), length=size, salt=group.digest, info=info).derive(shared)


def _place(run: str, round_: int) -> tuple[bytes, bytes]:
    return run.encode(), round_.to_bytes(4, "big")


def _bind(*parts: bytes) -> bytes:
    """All parts in one, so that no two lists of parts give the same bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)
