"""Sites of one round in one process: real keys and masks, small vectors, a disk between steps."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedqlora import protocol_pb2 as pb
from fedqlora.secure.collector import Collector
from fedqlora.secure.keys import Group
from fedqlora.secure.masks import Ring, to_bytes
from fedqlora.secure.participant import Participant
from fedqlora.secure.state import Secrets

LENGTH = 40


def signing_key(site: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(site.encode().ljust(32, b"."))


def values_of(site: str) -> Ring:
    """A vector that says whose it is: its first value is the number of the site's letter."""
    own = np.arange(LENGTH, dtype=np.uint32) * np.uint32(1000)
    return own + np.uint32(ord(site[0]))


def total_of(sites: Iterable[str]) -> Ring:
    total = np.zeros(LENGTH, dtype=np.uint32)
    for site in sites:
        total += values_of(site)
    return total


@dataclass
class House:
    """All sites of a round, each pinning all others."""

    names: str
    run: str = "r"
    round: int = 1
    least: int = 3
    disks: dict[str, Secrets] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.names:
            opened = self.disks[name].opened if name in self.disks else None
            self.disks[name] = Secrets.make(self.run, self.round, opened)

    def again(self) -> House:
        """The same round with fresh keys, as after a ServerApp that was killed."""
        return House(self.names, self.run, self.round, self.least, self.disks)

    def pinned(self, site: str) -> dict[str, Ed25519PublicKey]:
        return {name: signing_key(name).public_key() for name in self.names if name != site}

    def site(self, name: str) -> Participant:
        """The site as a restart finds it."""
        secrets = Secrets.from_json(self.disks[name].to_json())
        return Participant(name, signing_key(name), self.pinned(name), self.least, secrets)

    def keys(self, names: Iterable[str] | None = None) -> list[pb.RoundKey]:
        return [self.site(name).advertise() for name in names or self.names]

    def group(self) -> Group:
        keys = {one.site: one.public for one in self.keys()}
        return Group(run=self.run, round=self.round, keys=keys)

    def mask(self, name: str, keys: list[pb.RoundKey] | None = None) -> pb.Masked:
        site = self.site(name)
        vector = values_of(name)
        sealed = site.mask(site.join(self.keys() if keys is None else keys), vector)
        self.disks[name] = site.secrets
        return pb.Masked(values=to_bytes(vector), sealed=sealed)

    def confirm(self, name: str, alive: Iterable[str]) -> bytes:
        site = self.site(name)
        signature = site.confirm(list(alive))
        self.disks[name] = site.secrets
        return signature

    def unmask(
        self, name: str, signatures: dict[str, bytes], sealed: dict[str, bytes]
    ) -> list[pb.Share]:
        site = self.site(name)
        shares = site.unmask(signatures, sealed)
        self.disks[name] = site.secrets
        return shares

    def collect(self, lost: Collection[str] = ()) -> Collector:
        """The masked vectors of all sites but the lost."""
        collector = Collector(self.group(), LENGTH)
        keys = self.keys()
        for name in self.names:
            if name not in lost:
                collector.add(name, self.mask(name, keys))
        return collector

    def finish(
        self, collector: Collector, silent: Collection[str] = (), gone: Collection[str] = ()
    ) -> Ring:
        """The sum; silent sites do not confirm, gone ones do not unmask."""
        alive = collector.alive
        signatures = {name: self.confirm(name, alive) for name in alive if name not in silent}
        for name, signature in signatures.items():
            collector.check_confirmation(name, signature, signing_key(name).public_key())
        for name in signatures:
            if name not in gone:
                shares = self.unmask(name, signatures, collector.sealed_for(name))
                collector.take(name, shares)
        return collector.open()
