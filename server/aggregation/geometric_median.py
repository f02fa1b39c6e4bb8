"""Geometric median: the point with the least sum of distances to all updates.

RFA, Pillutla et al., arXiv 1912.13445: Weiszfeld's iteration with smoothed distances. The point
is a weighted mean of the updates, so only their inner products are needed, and the method's own
mean is taken with the final weights: also in product space and with mixed ranks. Flower has none.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from server.aggregation.collected import Updates
from server.aggregation.factors import Matrix

_SMOOTHING = 1e-6  # of the mean distance, where an update lies on the point itself
_TURNS = 200
_UNIT = 2**20


def weigh_by_distance(updates: Updates, gram: Matrix) -> Updates:
    """The same updates with the weights of their geometric median, which sum to about 2**20.

    Args:
        updates: of the sites; their weights count as in the paper.
        gram: inner products of the updates, in their order.
    """
    own = np.array([weight for _, weight in updates.values()], dtype=np.float64)
    shares = find_shares(gram, own)
    whole = {site: round(share * _UNIT) for site, share in zip(updates, shares, strict=True)}
    return {site: (delta, whole[site]) for site, (delta, _) in updates.items() if whole[site] > 0}


def find_shares(gram: Matrix, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares (n,) with sum 1 whose weighted mean is the geometric median of n vectors.

    Args:
        gram: their inner products (n, n).
        weights: positive, of any sum.
    """
    shares: NDArray[np.float64] = weights / weights.sum()
    for _ in range(_TURNS):
        before = shares
        squares = np.diagonal(gram) - 2 * gram @ shares + shares @ gram @ shares
        distances = np.sqrt(np.maximum(squares, 0.0))
        least = _SMOOTHING * distances.mean()
        if least == 0:
            break
        shares = weights / np.maximum(distances, least)
        shares = shares / shares.sum()
        if np.abs(shares - before).max() < 1e-9:
            break
    return shares
