"""Sums: a site's part in rounds of which the coordinator opens the sum of all updates only.

    describe: renew -> train: join, pack -> answer each further step

Updates are masked (client/masking.py) or encrypted (client/encrypting.py), as the run asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from client.encrypting import Encrypting
from client.masking import Masking
from client.policy import Policy, check_key_site
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter
from fedqlora.audit import digest_of
from fedqlora.config import RunConfig
from fedqlora.secure import ckks
from fedqlora.secure.keys import Group
from fedqlora.secure.vector import Counts

Step = pb.Confirm | pb.Unmask | pb.Wrap | pb.Decrypt
"""What is asked of a site beside describing and training."""
StepAnswer = pb.Confirmation | pb.Unmasking | pb.WrappedKey | pb.Decryption
Facts = Mapping[str, str | int]
"""What the audit log says of a step."""


class Sums:
    """The rounds of one site.

    Args:
        site: the site's name.
        state: holds a folder of each kind; made when the first file is written.
        policy: the site's rules.
        peers: the signing keys of the sites that the policy pins (client/peers.py).
        key: the site's signing key.
    """

    def __init__(
        self,
        site: str,
        state: Path,
        policy: Policy,
        peers: Mapping[str, Ed25519PublicKey],
        key: Ed25519PrivateKey,
    ) -> None:
        self._site = site
        self._policy = policy
        self._masking = Masking(site, state / "secagg", policy, peers, key)
        self._encrypting = Encrypting(site, state / "encryption", policy, peers, key)

    def join(
        self, header: pb.Header, config: RunConfig, body: pb.Describe | pb.Train
    ) -> Group | None:
        """Check what a run asks of the site, and the sites of a round, before any record is read.

        Returns:
            The sites whose updates are added up; None before a round, and in a run whose updates
            are open.

        Raises:
            PolicyRefusal: the policy does not allow it.
            SecureAggregationError: see Participant.join and secure.keys.check_group.
            EncryptionError: the package for it is not installed.
        """
        if not config.sums_only:
            return None
        encrypted = config.homomorphic_encryption.enabled
        if encrypted:
            ckks.check_installed()
            check_key_site(self._policy, config, self._site)
        self._masking.check()
        if isinstance(body, pb.Describe):
            return None
        part = self._encrypting if encrypted else self._masking
        return part.join(header, body.round_keys)

    def renew(self, run: str, round_: int, config: RunConfig) -> pb.RoundKey | None:
        """A fresh key for a round; None in a run whose updates are open."""
        if config.homomorphic_encryption.enabled:
            return self._encrypting.renew(run, round_)
        if config.secure_aggregation.enabled:
            return self._masking.renew(run, round_)
        return None

    def pack(
        self,
        header: pb.Header,
        config: RunConfig,
        body: pb.Train,
        group: Group,
        delta: Adapter,
        counts: Counts,
    ) -> pb.Update:
        """An update that says nothing by itself.

        Raises:
            UpdateError: a value is not finite or too large; nothing leaves.
            SecureAggregationError: see Masking.mask and Encrypting.encrypt.
        """
        if config.homomorphic_encryption.enabled:
            key = body.encryption_key
            return self._encrypting.encrypt(header, config, group, key, delta, counts)
        return pb.Update(masked=self._masking.mask(header, config, group, delta, counts))

    def answer(
        self, header: pb.Header, config: RunConfig, body: Step
    ) -> tuple[StepAnswer, str, Facts]:
        """Carry out a further step of a round.

        Returns:
            The answer, and its event and facts for the audit log.

        Raises:
            SecureAggregationError: it would reveal more than a sum.
        """
        match body:
            case pb.Confirm():
                confirmation = self._masking.confirm(header, body.alive)
                return confirmation, "confirmed", {"sites": ",".join(body.alive)}
            case pb.Unmask():
                unmasking = self._masking.unmask(header, config, body)
                return unmasking, "unmasked", {"signatures": len(body.signatures)}
            case pb.Wrap():
                wrapped = self._encrypting.wrap(header, config, body)
                return wrapped, "wrapped", {"sites": ",".join(sorted(wrapped.wrapped))}
            case pb.Decrypt():
                decryption = self._encrypting.decrypt(header, config, body)
                return (
                    decryption,
                    "decrypted",
                    {
                        "sites": ",".join(body.alive),
                        "bytes_out": decryption.ByteSize(),
                        "tensors": digest_of(decryption.values),
                    },
                )


def describe_company(config: RunConfig, group: Group | None) -> dict[str, str]:
    """With whom an update was masked, or under whose key and for which sum it was encrypted."""
    if group is None:
        return {}
    sites = ",".join(group.sites)
    if config.homomorphic_encryption.enabled:
        key_site = str(config.homomorphic_encryption.key_site)
        return {"encrypted_with": sites, "key_site": key_site}
    return {"masked_with": sites}
