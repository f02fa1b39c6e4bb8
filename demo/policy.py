"""The policy of a demo hospital: it approves one base model, and else the defaults."""

from __future__ import annotations

_POLICY = """\
# What this hospital allows, whatever the coordinator asks. Every key: client/policy.py.

[models]
# Base models that may see our records; `python -m client digest` prints a folder's digest.
digests = ["{digest}"]

[limits]
rank = 64
steps = 200
rounds = 100

[metrics]
allowed = ["examples", "tokens", "train_loss", "validation_loss", "step_seconds"]
"""


def render_policy(digest: str) -> str:
    """The text of policy.toml that approves the base model with this digest."""
    return _POLICY.format(digest=digest)
