"""Participant: a site's part in one round of secure aggregation.

After Bonawitz et al. (CCS 2017, https://eprint.iacr.org/2017/281), active-adversary variant, with
the seeds of the common masks shared in place of the key that they come from
(docs/adr/0016-secure-aggregation.md):

    fresh --mask--> masked --confirm--> confirmed --unmask--> spent

Guarantees, each restated by a test in tests/fedqlora/secure:

- Only sites whose signing key is among the given peers are masked with, and at least `least`.
- A key masks one vector; a site confirms one list of survivors, which it is on and which has at
  least `least` sites and a threshold of them; it unmasks once, after a threshold of sites has
  signed that very list.
- A round of a run that was opened before is opened again, by a new key, for the same survivors
  only: two sums that differ by one site would give that site's update.
- Of one site never both is given: a share of its own mask only where it is on the list, a share
  of a mask that it has in common with a peer only where exactly one of the two is on the list.

Edge cases: a step that is refused changes nothing; a step out of order is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedqlora import protocol_pb2 as pb
from fedqlora.errors import SecureAggregationError
from fedqlora.secure.keys import (
    SEED_BYTES,
    Group,
    check_group,
    derive_mask_seed,
    sign_round_key,
)
from fedqlora.secure.masks import Ring, add_mask, remove_mask
from fedqlora.secure.sealing import release, seal
from fedqlora.secure.state import Secrets, Stage


class Participant:
    """One site in one round.

    Args:
        site: its name.
        key: its signing key.
        peers: the signing keys of the sites that it masks with, as its hospital has pinned them.
        least: fewest sites whose sum it takes part in, itself included.
        secrets_: where the round stands; afterwards `secrets` has to be kept before anything that a
            step returned may leave.
    """

    def __init__(
        self,
        site: str,
        key: Ed25519PrivateKey,
        peers: Mapping[str, Ed25519PublicKey],
        least: int,
        secrets_: Secrets,
    ) -> None:
        self._site = site
        self._key = key
        self._known = {**peers, site: key.public_key()}
        self._least = least
        self.secrets = secrets_

    def advertise(self) -> pb.RoundKey:
        """The round key, signed."""
        return sign_round_key(
            self._key,
            run=self.secrets.run,
            round_=self.secrets.round,
            site=self._site,
            public=self._private.public_key().public_bytes_raw(),
        )

    def join(self, round_keys: Sequence[pb.RoundKey]) -> Group:
        """Check the sites that a round names; nothing is kept and no data is needed.

        Raises:
            SecureAggregationError: the key was used, a site is not pinned, a key is not its
                owner's for this round, or the sites are too few or too many.
        """
        self._expect("fresh")
        return check_group(
            round_keys,
            self._known,
            run=self.secrets.run,
            round_=self.secrets.round,
            site=self._site,
            own=self._private.public_key().public_bytes_raw(),
            least=self._least,
        )

    def mask(self, group: Group, vector: Ring) -> dict[str, bytes]:
        """Mask a vector, in place, and seal the shares that open the masks for each site.

        Args:
            group: what `join` returned.
            vector: the site's own; masked afterwards.

        Returns:
            For each site of the round, itself included: its shares, which only it can open.

        Raises:
            SecureAggregationError: the key has masked a vector before.
        """
        self._expect("fresh")
        own = secrets.token_bytes(SEED_BYTES)
        add_mask(vector, own)
        seeds = [own]
        for peer in group.others(self._site):
            seed = derive_mask_seed(self._private, self._site, peer, group)
            (add_mask if self._site < peer else remove_mask)(vector, seed)
            seeds.append(seed)
        sealed = seal(self._site, self._private, group, seeds)
        self.secrets = replace(self.secrets, stage="masked", keys=group.keys)
        return sealed

    def confirm(self, alive: Sequence[str]) -> bytes:
        """Sign a list of survivors: the same one again, or the first.

        Raises:
            SecureAggregationError: the site masked nothing or confirmed another list, or the list
                is not sorted, names others than the round's sites, lacks this one or is too short.
        """
        listed = tuple(alive)
        if self.secrets.stage != "confirmed" or listed != self.secrets.alive:
            self._expect("masked")
        group = self._group
        if list(listed) != sorted(set(listed) & set(group.sites)) or self._site not in listed:
            raise SecureAggregationError(
                "secure_aggregation.survivors",
                f"a list of survivors has to name sites of the round once each, in order, and site "
                f"{self._site}, which has sent its update; it was given another",
            )
        before = self.secrets.opened.get(self.secrets.round, listed)
        if listed != before:
            raise SecureAggregationError(
                "secure_aggregation.replay",
                f"round {self.secrets.round} was opened before as a sum of {len(before)} sites, "
                "and a second sum of others would give away what lies between; start a new run",
            )
        fewest = max(self._least, group.threshold)
        if len(listed) < fewest:
            raise SecureAggregationError(
                "secure_aggregation.survivors",
                f"a sum of {len(listed)} of {len(group.sites)} sites is asked for, and site "
                f"{self._site} opens one of at least {fewest}",
            )
        self.secrets = replace(self.secrets, stage="confirmed", alive=listed)
        return self._key.sign(group.alive_statement(listed))

    def unmask(
        self, signatures: Mapping[str, bytes], sealed: Mapping[str, bytes]
    ) -> list[pb.Share]:
        """This site's shares of what opens the sum, once; the key is spent afterwards.

        Args:
            signatures: of the confirmed list, by site.
            sealed: the shares that each survivor has sealed for this site.

        Raises:
            SecureAggregationError: the site has confirmed no list or has unmasked before, too few
                survivors have signed the list, a signature is not of it, or shares do not open.
        """
        self._expect("confirmed")
        group, alive = self._group, self.secrets.alive
        statement = group.alive_statement(alive)
        for site, signature in signatures.items():
            try:
                if site not in alive:
                    raise InvalidSignature
                self._known[site].verify(signature, statement)
            except InvalidSignature:
                raise SecureAggregationError(
                    "secure_aggregation.signatures",
                    f"site {site[:40]} has not signed the list of survivors that site {self._site} "
                    "has; sites were shown different lists",
                ) from None
        if len(signatures) < group.threshold:
            raise SecureAggregationError(
                "secure_aggregation.signatures",
                f"{len(signatures)} sites have signed the list of survivors and site {self._site} "
                f"asks for {group.threshold}; ask more of them",
            )
        shares = release(self._site, self._private, group, alive, sealed)
        self.secrets = replace(
            self.secrets,
            stage="spent",
            private=b"",
            keys={},
            alive=(),
            opened={**self.secrets.opened, self.secrets.round: alive},
        )
        return shares

    def _expect(self, stage: Stage) -> None:
        """Refuse a step that does not follow the last one."""
        if self.secrets.stage != stage:
            raise SecureAggregationError(
                "secure_aggregation.once",
                f"site {self._site} has already done this step of round {self.secrets.round}, or "
                f"one before it is missing (its key is {self.secrets.stage}, not {stage}); each is "
                "done once, so ask it for a new key",
            )

    @property
    def _private(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self.secrets.private)

    @property
    def _group(self) -> Group:
        return Group(run=self.secrets.run, round=self.secrets.round, keys=self.secrets.keys)
