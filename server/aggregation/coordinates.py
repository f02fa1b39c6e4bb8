"""Coordinates: the median and the trimmed mean of the sites' deltas, value by value.

Yin et al., arXiv 1803.01498. Both need tensors that mean the same at every site: A and B as they
were sent, not factors that an SVD made anew. Weights do not count.
"""

from __future__ import annotations

import numpy as np
from flwr.server.strategy.aggregate import aggregate_median

from fedqlora.errors import UpdateError
from server.aggregation.collected import Updates


def take_median(updates: Updates) -> Updates:
    """One update: the median of each value (Flower's own function)."""
    names = list(next(iter(updates.values()))[0])
    results = [([delta[name] for name in names], 1) for delta, _ in updates.values()]
    return {"": (dict(zip(names, aggregate_median(results), strict=True)), 1)}


def take_trimmed_mean(updates: Updates, malicious: int) -> Updates:
    """One update: of each value the mean without the `malicious` largest and smallest.

    Flower's `aggregate_trimmed_avg` takes a share instead of a number, and its share of n is cut
    to a whole number: 0.29 of 100 leaves out 28. A promise about f sites needs f.

    Raises:
        UpdateError: nothing would be left.
    """
    if len(updates) <= 2 * malicious:
        raise UpdateError(
            f"a trimmed mean without {malicious} at each end needs {2 * malicious + 1} updates "
            f"and has {len(updates)}; lower aggregation.malicious_sites"
        )
    deltas = [delta for delta, _ in updates.values()]
    trimmed = {}
    for name in deltas[0]:
        values = np.sort(np.stack([delta[name] for delta in deltas]), axis=0)
        kept = values[malicious : len(deltas) - malicious]
        trimmed[name] = kept.mean(axis=0, dtype=np.float64).astype(np.float32)
    return {"": (trimmed, 1)}
