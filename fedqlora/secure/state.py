"""Secrets: what a site keeps of a round of secure aggregation between its steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

Stage = Literal["fresh", "masked", "confirmed", "spent"]


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """What a site keeps between the steps of a round; nothing of it may leave.

    Attributes:
        run: the run's name.
        round: the only round that the key is for.
        private: the X25519 private key (32 bytes); empty once it is spent.
        stage: the last step that was done.
        keys: the round keys of all sites, once it has masked.
        alive: the list of survivors, once it has confirmed one.
        opened: the survivors whose sum this site has helped to open, by round of the run.
    """

    run: str
    round: int
    private: bytes
    stage: Stage = "fresh"
    keys: Mapping[str, bytes] = field(default_factory=dict)
    alive: tuple[str, ...] = ()
    opened: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def make(
        cls, run: str, round_: int, opened: Mapping[int, tuple[str, ...]] | None = None
    ) -> Self:
        """A fresh key for one round, with what the run's earlier rounds have opened."""
        private = X25519PrivateKey.generate().private_bytes_raw()
        return cls(run=run, round=round_, private=private, opened=opened or {})

    def to_json(self) -> str:
        """For the site's own disk."""
        keys = {site: key.hex() for site, key in self.keys.items()}
        return json.dumps({**vars(self), "private": self.private.hex(), "keys": keys})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        values = json.loads(text)
        values["private"] = bytes.fromhex(values["private"])
        values["keys"] = {site: bytes.fromhex(key) for site, key in values["keys"].items()}
        values["alive"] = tuple(values["alive"])
        values["opened"] = {int(key): tuple(names) for key, names in values["opened"].items()}
        return cls(**values)
