"""Krum and multi-Krum: the updates whose nearest neighbours are near.

Blanchard et al., arXiv 1703.02757: an update's score is the sum of its squared distances to its
n - f - 2 nearest; n >= 2 f + 3 or it promises nothing. Multi-Krum takes the n - f - 2 best, the
most for which the promise holds (El Mhamdi et al., arXiv 1802.07927).

It leaves out whoever is unlike the others, so also an honest hospital with unlike patients.

Flower's `aggregate_krum` and `select_multikrum` have no such bound on n, hand on values instead
of names, and know factors only; the tests hold this one to theirs.
"""

from __future__ import annotations

import numpy as np

from fedqlora.errors import UpdateError
from server.aggregation.collected import Updates
from server.aggregation.factors import Matrix


def select_by_krum(updates: Updates, distances: Matrix, malicious: int, *, many: bool) -> Updates:
    """The one best update, or with `many` the n - f - 2 best.

    Args:
        updates: of the sites.
        distances: squared, between the updates, in their order.
        malicious: f.
        many: whether this is multi-Krum.

    Raises:
        UpdateError: there are fewer than 2 f + 3.
    """
    count = len(updates)
    if count < 2 * malicious + 3:
        raise UpdateError(
            f"Krum against {malicious} malicious sites needs {2 * malicious + 3} updates and has "
            f"{count}; lower aggregation.malicious_sites"
        )
    near = count - malicious - 2
    others = distances + np.diag(np.full(count, np.inf))
    scores = np.sort(others, axis=1)[:, :near].sum(axis=1)
    # Equal scores go by the sites' names: the sort is stable.
    best = np.argsort(scores, kind="stable")[: near if many else 1]
    chosen = {list(updates)[index] for index in best}
    return {site: update for site, update in updates.items() if site in chosen}
