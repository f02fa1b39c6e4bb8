"""Masking: a site's part in secure aggregation, round by round, and what it keeps of it on disk.

    describe: renew -> train: join, mask -> confirm -> unmask, renew

The secrets of a step are on disk before anything that the step gives leaves, so that a trainer
that was killed goes on where it stood and does no step twice. A disk with them, in strange hands,
does not open the site's own update: its own mask is kept in the other sites' shares only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from client.policy import Policy
from client.run_files import RunFiles
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter
from fedqlora.config import RunConfig
from fedqlora.errors import DataError, PolicyRefusal, SecureAggregationError
from fedqlora.secure.keys import Group
from fedqlora.secure.masks import to_bytes
from fedqlora.secure.participant import Participant
from fedqlora.secure.state import Secrets
from fedqlora.secure.vector import Counts, pack_for


class Masking:
    """The rounds of one site.

    Args:
        site: the site's name.
        folder: holds one file a run, readable by its owner only; made when the first is written.
        policy: the site's rules.
        peers: the signing keys of the sites that the policy pins (client/peers.py).
        key: the site's signing key.
    """

    def __init__(
        self,
        site: str,
        folder: Path,
        policy: Policy,
        peers: Mapping[str, Ed25519PublicKey],
        key: Ed25519PrivateKey,
    ) -> None:
        self._site = site
        self._files = RunFiles(folder)
        self._least = policy.secure_aggregation.sites
        self._peers = peers
        self._key = key

    def check(self) -> None:
        """Refuse a run that could never find enough sites.

        Raises:
            PolicyRefusal: the policy pins too few of the roster's sites.
        """
        count = len(self._peers) + 1
        if count < self._least:
            raise PolicyRefusal(
                "secure_aggregation.sites",
                f"site {self._site} gives its update into sums of at least {self._least} sites, "
                f"itself included, and its policy pins {count - 1} others that are in the roster; "
                "pin more under [peers] (secure_aggregation.sites)",
            )

    def renew(self, run: str, round_: int) -> pb.RoundKey:
        """Replace the run's key by a fresh one for a round; what the old one masked stays so."""
        before = self._read(run)
        opened = before.opened if before else {}
        return self._keep(Secrets.make(run, round_, opened)).advertise()

    def join(self, header: pb.Header, round_keys: Sequence[pb.RoundKey]) -> Group:
        """Check the sites of a round, before any record is read.

        Raises:
            SecureAggregationError: see Participant.join; also a round that the key is not for.
        """
        return self._participant(header).join(round_keys)

    def mask(
        self, header: pb.Header, config: RunConfig, group: Group, delta: Adapter, counts: Counts
    ) -> pb.Masked:
        """A delta and what belongs to it, masked for a group.

        Args:
            header: the instruction's.
            config: the run's weighting and scale.
            group: what `join` returned.
            delta: the round's change.
            counts: beside it; its weight is set here from what the run weights by.

        Raises:
            UpdateError: a value is not finite or too large; nothing was masked.
            SecureAggregationError: the key has masked an update before.
        """
        vector = pack_for(config, len(group.sites), delta, counts)
        participant = self._participant(header)
        sealed = participant.mask(group, vector)
        self._keep(participant.secrets)
        return pb.Masked(values=to_bytes(vector), sealed=sealed)

    def confirm(self, header: pb.Header, alive: Sequence[str]) -> pb.Confirmation:
        """Sign a list of survivors.

        Raises:
            SecureAggregationError: see Participant.confirm.
        """
        participant = self._participant(header)
        signature = participant.confirm(alive)
        self._keep(participant.secrets)
        return pb.Confirmation(signature=signature)

    def unmask(self, header: pb.Header, config: RunConfig, body: pb.Unmask) -> pb.Unmasking:
        """Give the shares that open the sum, and a key for the next round where there is one.

        Raises:
            SecureAggregationError: see Participant.unmask.
        """
        participant = self._participant(header)
        shares = participant.unmask(body.signatures, body.sealed)
        self._keep(participant.secrets)
        unmasking = pb.Unmasking(shares=shares)
        if header.round < config.federation.rounds:
            unmasking.round_key.CopyFrom(self.renew(header.run, header.round + 1))
        return unmasking

    def _participant(self, header: pb.Header) -> Participant:
        """The site in the round of an instruction."""
        secrets = self._read(header.run)
        if secrets is None or secrets.round != header.round:
            raise SecureAggregationError(
                "secure_aggregation.round",
                f"site {self._site} has no key for round {header.round} of this run; ask it to "
                "describe itself first",
            )
        return Participant(self._site, self._key, self._peers, self._least, secrets)

    def _keep(self, secrets: Secrets) -> Participant:
        """Write a run's secrets, then use them."""
        self._files.write(secrets.run, secrets.to_json())
        return Participant(self._site, self._key, self._peers, self._least, secrets)

    def _read(self, run: str) -> Secrets | None:
        """A run's secrets; None before the first."""
        path = self._files.path(run)
        if not path.exists():
            return None
        try:
            return Secrets.from_json(path.read_text())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise DataError(
                f"{path} is damaged; restore it from a backup, for without it this run's rounds "
                "could be opened a second time"
            ) from None
