"""The policy of a demo hospital: it approves one base model, and else the defaults."""

from __future__ import annotations

_POLICY = """\
# What this hospital allows, whatever the coordinator asks. Every key: client/policy.py.

[models]
# Base models that may see our records; `python -m client digest` prints a folder's digest.
digests = ["{digest}"]

[limits]
rank = 64
steps = {steps}
rounds = 100

[metrics]
allowed = ["examples", "tokens", "train_loss", "validation_loss", "step_seconds"]
"""


def render_policy(digest: str, steps: int = 200) -> str:
    """The text of policy.toml that approves one base model and so many steps a round."""
    return _POLICY.format(digest=digest, steps=steps)
