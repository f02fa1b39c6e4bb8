"""RoLoRA: B and A train in alternate rounds, so the mean of one is the mean of the products.

Chen et al., arXiv 2409.02346. Only the half that trains travels up.
"""

from __future__ import annotations

from fedqlora.adapter import Adapter
from fedqlora.halves import select_trained
from server.aggregation.aggregate import Aggregate
from server.aggregation.fedavg import FedAvg


class RoLora:
    """Folds the deltas of a round's half in; memory does not grow with the number of sites.

    Args:
        adapter: the round's starting point.
        round_: says which half trains.
    """

    def __init__(self, adapter: Adapter, round_: int) -> None:
        self._adapter = adapter
        half = select_trained(adapter, "rolora", round_)
        self._mean = FedAvg({name: adapter[name] for name in half})

    def add(self, site: str, delta: Adapter, weight: int) -> None:
        """Fold in one site's delta of the half that trained; see Aggregator."""
        self._mean.add(site, delta, weight)

    def finish(self) -> Aggregate:
        """The other half as it was, and this one plus the weighted mean delta.

        Raises:
            UpdateError: nothing was folded in.
        """
        return Aggregate(adapter={**self._adapter, **self._mean.finish().adapter})
