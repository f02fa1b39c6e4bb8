"""FFA: A stays as it started at every site, so the mean of B gives the mean of the products.

Sun et al., arXiv 2403.12313. Only B travels up.
"""

from __future__ import annotations

from fedqlora.adapter import Adapter
from fedqlora.halves import select_trained
from server.aggregation.fedavg import FedAvg


class Ffa(FedAvg):
    """The mean of B, with A as it was.

    Args:
        adapter: the round's starting point.
    """

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(adapter, select_trained(adapter, "ffa", 1))
