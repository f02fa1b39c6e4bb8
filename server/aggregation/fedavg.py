"""FedAvg over A and B: the weighted mean of the sites' deltas.

McMahan et al., arXiv 1602.05629; for LoRA factors FedIT, arXiv 2305.05644. The mean of A
and the mean of B are not the factors of the mean product; `exact_svd` takes that one
(docs/adr/0008-exact-aggregation.md).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from fedqlora.adapter import Adapter, FloatArray, chunks
from fedqlora.errors import UpdateError
from server.aggregation.aggregate import Aggregate, check_weight

# 32 fraction bits: an absolute error below 1.2e-10 in a delta, with room for a total weight
# times largest value of 2**31.
FRACTION_BITS = 32
_LIMIT = 2**62


class FedAvg:
    """Folds deltas in one at a time; memory does not grow with the number of sites.

    Sums are int64 fixed point: integer addition is associative, so the order in which
    replies arrive cannot change a single bit of the result.

    Args:
        adapter: the round's starting point.
        trained: names of the tensors that trained, which the deltas hold; None for all. The
            others stay as they were.
    """

    def __init__(self, adapter: Adapter, trained: Collection[str] | None = None) -> None:
        self._adapter = adapter
        names = adapter if trained is None else trained
        self._sums = {name: np.zeros(adapter[name].shape, dtype=np.int64) for name in names}
        self._weight = 0
        self._bound = 0

    def add(self, site: str, delta: Adapter, weight: int) -> None:
        """Fold in one site's delta.

        Args:
            site: its name.
            delta: validated update, shaped like the adapter.
            weight: positive integer.

        Raises:
            UpdateError: the weight is not positive, or the sum would leave int64; nothing
                was folded in.
        """
        check_weight(site, weight)
        largest = max((_largest(value) for value in delta.values()), default=0.0)
        bound = self._bound + weight * (int(largest * 2**FRACTION_BITS) + 1)
        if bound >= _LIMIT:
            raise UpdateError(
                f"site {site}'s largest value {largest:.3g} times weight {weight} is out of range"
            )
        for name, total in self._sums.items():
            _fold(total, delta[name], weight)
        self._weight += weight
        self._bound = bound

    def finish(self) -> Aggregate:
        """The next adapter: the starting point plus the weighted mean delta.

        Raises:
            UpdateError: nothing was folded in.
        """
        if self._weight == 0:
            raise UpdateError("no update was folded in; a round needs at least one")
        scale = 2.0**FRACTION_BITS * self._weight
        moved = {name: self._adapter[name].copy() for name in self._sums}
        for name, value in moved.items():
            for part, total in zip(chunks(value), chunks(self._sums[name]), strict=True):
                part += total / scale
        return Aggregate(adapter={**self._adapter, **moved})


def _largest(value: FloatArray) -> float:
    """Largest magnitude, without an array of magnitudes."""
    return max(float(value.max(initial=0)), -float(value.min(initial=0)))


def _fold(total: NDArray[np.int64], delta: FloatArray, weight: int) -> None:
    """Add weight * fixed_point(delta) to the sums, in place."""
    for sums, values in zip(chunks(total), chunks(delta), strict=True):
        fixed = np.rint(np.multiply(values, 2.0**FRACTION_BITS, dtype=np.float64))
        sums += fixed.astype(np.int64) * weight
