"""Peers: the other sites whose signing keys this site's hospital has compared out of band.

Guarantees, each restated by a test in tests/client/test_peers.py:

- A site that the policy does not pin is never among the peers, whatever the roster says: a
  coordinator cannot add a peer.
- A pinned site is a peer only under the key whose fingerprint the policy names; another key in
  the roster is an error, not a peer less.
- A pinned site that the roster lacks, because it was revoked or has not come yet, is no peer.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from client.policy import Policy
from fedqlora.errors import ConfigError
from fedqlora.keys import load_public_key, public_key

ROSTER_FILE = "roster.json"
# Both as certs.roster writes them; a test compares the two.
_CONTEXT = b"fedqlora roster v1\n"
_FINGERPRINT = b"fedqlora signing key v1\n"
_FINGERPRINT_BYTES = 15


def name_key(key: Ed25519PublicKey) -> str:
    """The fingerprint of a signing key, as `python -m certs accept` prints it."""
    digest = hashlib.sha256(_FINGERPRINT + key.public_bytes_raw()).digest()
    text = base64.b32encode(digest[:_FINGERPRINT_BYTES]).decode("ascii")
    return "-".join(text[start : start + 4] for start in range(0, len(text), 4))


def choose_peers(
    policy: Policy, roster: Mapping[str, Ed25519PublicKey], site: str
) -> dict[str, Ed25519PublicKey]:
    """The signing keys of the sites that count, by name.

    Args:
        policy: the site's rules, with the pinned fingerprints.
        roster: all sites' signing keys as the coordinator signed them.
        site: this site's own name, which is no peer.

    Raises:
        ConfigError: the roster names another key for a pinned site.
    """
    peers = {}
    for name, pinned in policy.peers.items():
        if name == site or name not in roster:
            continue
        found = name_key(roster[name])
        if found != pinned:
            raise ConfigError(
                f"The roster names a signing key with fingerprint {found} for site {name}, and "
                f"the policy pins {pinned} (peers.{name}): ask that site by telephone before you "
                "change either."
            )
        peers[name] = roster[name]
    return peers


def load_peers(policy: Policy, keys: Path, site: str) -> dict[str, Ed25519PublicKey]:
    """The peers, from the signed roster in the site's key folder.

    Args:
        policy: the site's rules.
        keys: folder with `coordinator.pub`, and `roster.json` with `roster.sig` where there is one.
        site: this site's own name.

    Raises:
        ConfigError: the roster is not the coordinator's, or names another key for a pinned site;
            or sites are pinned and there is no roster to look for them.
    """
    path = keys / ROSTER_FILE
    if not path.exists():
        if policy.peers:
            raise ConfigError(
                f"The policy pins peers, but {path} does not exist: accept the coordinator's reply "
                "with `python -m certs accept`, which puts it there."
            )
        return {}
    return choose_peers(policy, read_roster(keys), site)


def read_roster(keys: Path) -> dict[str, Ed25519PublicKey]:
    """The signing keys of all sites of the roster, once its signature was checked.

    Raises:
        ConfigError: a file is missing, not signed by the coordinator, or no roster.
    """
    path = keys / ROSTER_FILE
    coordinator = load_public_key(keys / "coordinator.pub")
    try:
        content = path.read_bytes()
        signature = bytes.fromhex(path.with_suffix(".sig").read_text(encoding="ascii"))
        coordinator.verify(signature, _CONTEXT + content)
        sites = {name: one["signing"] for name, one in json.loads(content)["sites"].items()}
    except (OSError, ValueError, InvalidSignature):
        raise ConfigError(
            f"{path} is not signed by the coordinator whose key lies beside it: accept the "
            "coordinator's latest reply."
        ) from None
    except (KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{path} is not a roster: accept the coordinator's latest reply."
        ) from None
    return {name: public_key(key) for name, key in sites.items()}
