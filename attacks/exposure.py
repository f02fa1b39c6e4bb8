"""Exposure: how far a secret that was trained on stands out among those that could have been.

Carlini et al. 2019, "The Secret Sharer" (arXiv 1802.08232): log2 of the number of candidates minus
log2 of the secret's rank by loss. The number of candidates is the most; a secret that was not
learned has 1.4 on average, 1 or less half of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

CHANCE = math.log2(math.e)
"""Mean exposure of a secret that says nothing, among many candidates."""


def exposure(secret: float, others: Sequence[float]) -> float:
    """Exposure in bits.

    Args:
        secret: the model's loss on the secret.
        others: its losses on the candidates that were not used. One that is as likely as the secret
            counts as likelier.
    """
    rank = 1 + sum(other <= secret for other in others)
    return math.log2(len(others) + 1) - math.log2(rank)
