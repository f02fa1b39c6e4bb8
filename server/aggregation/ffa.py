"""FFA: A stays as it started at every site, so the mean of B gives the mean of the products.

Sun et al., arXiv 2403.12313. Only B travels up.
"""

from __future__ import annotations

from fedqlora.adapter import Adapter
from fedqlora.halves import select_trained
from server.aggregation.aggregate import Aggregate
from server.aggregation.fedavg import FedAvg


class Ffa:
    """Folds the deltas of B in one at a time; memory does not grow with the number of sites.

    Args:
        adapter: the round's starting point.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._mean = FedAvg({name: adapter[name] for name in select_trained(adapter, "ffa", 1)})

    def add(self, site: str, delta: Adapter, weight: int) -> None:
        """Fold in one site's delta of B; see Aggregator."""
        self._mean.add(site, delta, weight)

    def finish(self) -> Aggregate:
        """A as it was, and B plus the weighted mean delta.

        Raises:
            UpdateError: nothing was folded in.
        """
        return Aggregate(adapter={**self._adapter, **self._mean.finish().adapter})
