"""Encrypting: a site's part in homomorphic encryption, round by round, and what it keeps on disk.

    describe: renew -> (key site: wrap) -> train: join, encrypt, renew -> (key site: decrypt, renew)

The key that decrypts is made for one round and lies on the key site's disk until that round's sum
was decrypted, or a fresh round key took its place.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from client.policy import Policy
from client.run_files import RunFiles
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter
from fedqlora.config import RunConfig
from fedqlora.errors import DataError, EncryptionError, UpdateError
from fedqlora.secure import ckks
from fedqlora.secure.encryption import (
    SEED_BYTES,
    add_checksums,
    checksum,
    seal_checksum,
    unwrap,
    wrap,
)
from fedqlora.secure.keys import Group, check_group, sign_round_key
from fedqlora.secure.masks import to_bytes
from fedqlora.secure.vector import Counts, pack_for


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What a site keeps between the steps of a round; bytes are hexadecimal.

    `secret`, `seed` and `keys` are the key site's, from WRAP until DECRYPT. `opened` has the sites
    whose sum was decrypted, by round of the run.
    """

    run: str
    round: int
    private: str
    secret: str = ""
    seed: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    opened: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def make(cls, run: str, round_: int, opened: Mapping[str, Sequence[str]]) -> Self:
        private = X25519PrivateKey.generate().private_bytes_raw().hex()
        return cls(run=run, round=round_, private=private, opened=opened)

    @property
    def key(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(bytes.fromhex(self.private))

    @property
    def group(self) -> Group:
        keys = {site: bytes.fromhex(key) for site, key in self.keys.items()}
        return Group(run=self.run, round=self.round, keys=keys)


class Encrypting:
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
        self._known = {**peers, site: key.public_key()}
        self._key = key

    def renew(self, run: str, round_: int) -> pb.RoundKey:
        """Replace the run's round key by a fresh one; what a round's key had to open stays shut."""
        before = self._read(run)
        opened = before.opened if before else {}
        kept = _Kept.make(run, round_, opened)
        self._keep(kept)
        return sign_round_key(
            self._key,
            run=run,
            round_=round_,
            site=self._site,
            public=kept.key.public_key().public_bytes_raw(),
        )

    def join(self, header: pb.Header, round_keys: Sequence[pb.RoundKey]) -> Group:
        """Check the sites of a round, before any record is read.

        Raises:
            SecureAggregationError: see secure.keys.check_group; also a round that the key is not
                for.
        """
        kept = self._now(header)
        return check_group(
            round_keys,
            self._known,
            run=kept.run,
            round_=kept.round,
            site=self._site,
            own=kept.key.public_key().public_bytes_raw(),
            least=self._least,
        )

    def wrap(self, header: pb.Header, config: RunConfig, body: pb.Wrap) -> pb.WrappedKey:
        """As the key site: make the round's keys, and wrap what encrypts for pinned sites only.

        Raises:
            SecureAggregationError: see `join`.
            EncryptionError: another site holds the key, or the round's key is made already.
        """
        self._check_holder(config)
        group = self.join(header, body.round_keys)
        kept = self._now(header)
        if kept.secret:
            raise EncryptionError(
                "homomorphic_encryption.once",
                f"site {self._site} has made the key of round {kept.round} already; ask it for a "
                "new round key first",
            )
        pair, seed = ckks.make_keys(), secrets.token_bytes(SEED_BYTES)
        keys = {site: key.hex() for site, key in group.keys.items()}
        self._keep(replace(kept, secret=pair.secret.hex(), seed=seed.hex(), keys=keys))
        return wrap(self._site, kept.key, group, pair.public, seed)

    def encrypt(
        self,
        header: pb.Header,
        config: RunConfig,
        group: Group,
        wrapped: pb.WrappedKey,
        delta: Adapter,
        counts: Counts,
    ) -> pb.Update:
        """A delta and what belongs to it, encrypted under the round's key.

        Args:
            header: the instruction's.
            config: the run's weighting, scale and key site.
            group: what `join` returned.
            wrapped: the round's key.
            delta: the round's change of B.
            counts: beside it; its weight is set here from what the run weights by.

        Returns:
            An update with the key for the next round, unless this is the key site, which still
            needs this round's.

        Raises:
            UpdateError: a value is not finite or too large; nothing was encrypted.
            EncryptionError: the key was not wrapped for this site and round.
        """
        kept, holder = self._now(header), str(config.homomorphic_encryption.key_site)
        public, seed = unwrap(self._site, kept.key, group, holder, wrapped)
        values = pack_for(config, len(group.sites), delta, counts).view(np.int32)
        own = checksum(values, seed)
        update = pb.Update(
            encrypted=pb.Encrypted(
                ciphertexts=ckks.encrypt(public, values),
                checksum=seal_checksum(self._site, kept.key, group, holder, own),
            )
        )
        if holder != self._site and header.round < config.federation.rounds:
            update.round_key.CopyFrom(self.renew(header.run, header.round + 1))
        return update

    def decrypt(self, header: pb.Header, config: RunConfig, body: pb.Decrypt) -> pb.Decryption:
        """As the key site: the exact sum of enough sites' updates, once.

        The key is gone afterwards, also where this is refused: whether a made-up ciphertext
        decrypts would say something about the key.

        Raises:
            EncryptionError: it is no sum of the sites named, or of too few of them; another site
                holds the key, or the sum was decrypted before.
        """
        self._check_holder(config)
        kept = self._now(header)
        if not kept.secret:
            raise EncryptionError(
                "homomorphic_encryption.once",
                f"site {self._site} has no key of round {kept.round} any longer, or not yet; each "
                "decrypts once, so start the round again",
            )
        alive = list(body.alive)
        self._check_sites(kept, alive)
        spent = replace(kept, secret="", seed="", keys={})
        self._keep(spent)
        expected = add_checksums(self._site, kept.key, kept.group, alive, body.checksums)
        try:
            values = ckks.decrypt(bytes.fromhex(kept.secret), body.ciphertexts)
        except UpdateError as error:
            raise EncryptionError("homomorphic_encryption.sum", str(error)) from None
        if not np.array_equal(checksum(values, bytes.fromhex(kept.seed)), expected):
            raise EncryptionError(
                "homomorphic_encryption.sum",
                f"what site {self._site} was asked to decrypt is not the sum of the updates of "
                f"{', '.join(alive)}; nothing of it leaves",
            )
        self._keep(replace(spent, opened={**kept.opened, str(kept.round): alive}))
        # Little-endian two's complement, as masked sums are.
        sums = to_bytes(values.astype(np.int32).view(np.uint32))
        decryption = pb.Decryption(values=sums)
        if header.round < config.federation.rounds:
            decryption.round_key.CopyFrom(self.renew(header.run, header.round + 1))
        return decryption

    def _check_sites(self, kept: _Kept, alive: Sequence[str]) -> None:
        """Refuse a sum of too few sites, of others, or another one than before."""
        if list(alive) != sorted(set(alive) & set(kept.keys)) or len(alive) < self._least:
            raise EncryptionError(
                "homomorphic_encryption.sites",
                f"a sum of {len(alive)} sites is to be decrypted, and site {self._site} decrypts "
                f"one of at least {self._least} of the round, each named once and in order",
            )
        before = kept.opened.get(str(kept.round), alive)
        if list(before) != list(alive):
            raise EncryptionError(
                "homomorphic_encryption.replay",
                f"round {kept.round} was decrypted before as a sum of {len(before)} sites, and a "
                "second sum of others would give away what lies between; start a new run",
            )

    def _check_holder(self, config: RunConfig) -> None:
        if config.homomorphic_encryption.key_site != self._site:
            raise EncryptionError(
                "homomorphic_encryption.key_site",
                f"site {self._site} does not hold the key of this run; ask its key site",
            )

    def _now(self, header: pb.Header) -> _Kept:
        """What belongs to the round of an instruction."""
        kept = self._read(header.run)
        if kept is None or kept.round != header.round:
            raise EncryptionError(
                "homomorphic_encryption.round",
                f"site {self._site} has no key for round {header.round} of this run; ask it to "
                "describe itself first",
            )
        return kept

    def _keep(self, kept: _Kept) -> None:
        self._files.write(kept.run, json.dumps(asdict(kept)))

    def _read(self, run: str) -> _Kept | None:
        """What is kept of a run; None before the first round key."""
        path = self._files.path(run)
        if not path.exists():
            return None
        try:
            return _Kept(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            raise DataError(
                f"{path} is damaged; restore it from a backup, for without it this run's rounds "
                "could be decrypted a second time"
            ) from None
