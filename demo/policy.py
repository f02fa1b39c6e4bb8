"""The policy of a demo hospital: it approves one base model, and else the defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

_POLICY = """\
# What this hospital allows, whatever the coordinator asks. Every key: client/policy.py.

[models]
# Base models that may see our records; `python -m client digest` prints a folder's digest.
digests = ["{digest}"]

[limits]
rank = {rank}
steps = {steps}
rounds = 100

[metrics]
allowed = ["examples", "tokens", "train_loss", "validation_loss", "step_seconds"]

[peers]
# The demo's hospitals, with which an update may be masked: fingerprints of their signing keys.
{peers}
[homomorphic_encryption]
# Whose key an update may be encrypted under.
key_sites = [{key_sites}]
"""


def render_policy(
    digest: str,
    steps: int = 200,
    rank: int = 32,
    peers: Mapping[str, str] = MappingProxyType({}),
    key_sites: Sequence[str] = (),
) -> str:
    """The text of policy.toml that approves one base model, so many steps a round and a rank.

    Args:
        digest: of the base model.
        steps: most in a round.
        rank: largest LoRA rank.
        peers: fingerprints of the hospitals' signing keys, by name.
        key_sites: hospitals that may decrypt a sum.
    """
    pinned = "".join(f'{name} = "{fingerprint}"\n' for name, fingerprint in peers.items())
    keepers = ", ".join(f'"{name}"' for name in key_sites)
    return _POLICY.format(digest=digest, steps=steps, rank=rank, peers=pinned, key_sites=keepers)
