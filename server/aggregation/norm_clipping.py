"""Norm clipping: an update longer than others usually are is cut to their length.

Sun et al., arXiv 1911.07963. The length is that of what the method averages: of the factors'
delta, or, for `exact_svd`, of the change of the product. A delta is cut by one factor for all its
tensors; the product of a delta cut in half is not half as long, so there the factor is searched.

The bound is the median of the norms in earlier rounds: updates are cut as they arrive and none is
held. The first round has no earlier one; it holds its updates and takes their own median.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import numpy as np

from fedqlora.adapter import Adapter
from server.aggregation.aggregate import Aggregate, Aggregator
from server.aggregation.collected import Updates
from server.aggregation.geometry import factor_gram, product_gram

Length = Callable[[Adapter], float]
_HALVINGS = 40


def factor_length(delta: Adapter) -> float:
    """The norm over all tensors."""
    return math.sqrt(factor_gram([delta])[0, 0])


def product_length(adapter: Adapter, scale: float) -> Length:
    """The norm of the change of the products of an adapter with a scale."""
    return lambda delta: math.sqrt(product_gram(adapter, [delta], scale)[0, 0])


def clip(delta: Adapter, length: Length, bound: float) -> Adapter:
    """A delta of at most a length: as it is, or all its tensors times one factor below 1."""
    if length(delta) <= bound:
        return delta
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if length(_shrink(delta, middle)) <= bound:
            low = middle
        else:
            high = middle
    return _shrink(delta, low)


def clip_all(updates: Updates, length: Length, bound: float) -> Updates:
    """All updates, each of at most a length; a bound of 0 stands for their own median."""
    bound = bound or statistics.median(length(delta) for delta, _ in updates.values())
    return {site: (clip(delta, length, bound), weight) for site, (delta, weight) in updates.items()}


class NormClipping:
    """Cuts updates as they arrive.

    Args:
        aggregator: the method's.
        length: of a delta.
        bound: the largest length.
    """

    def __init__(self, aggregator: Aggregator, length: Length, bound: float) -> None:
        self._aggregator = aggregator
        self._length = length
        self._bound = bound

    def add(self, site: str, delta: Adapter, weight: int) -> None:
        """Cut one site's delta and fold it in; see Aggregator.

        Raises:
            UpdateError: as the method's aggregator.
        """
        self._aggregator.add(site, clip(delta, self._length, self._bound), weight)

    def finish(self) -> Aggregate:
        """The method's result.

        Raises:
            UpdateError: no update was taken.
        """
        return self._aggregator.finish()


def _shrink(delta: Adapter, factor: float) -> Adapter:
    return {name: value * np.float32(factor) for name, value in delta.items()}
