"""RoLoRA: B and A train in alternate rounds, so the mean of one is the mean of the products.

Chen et al., arXiv 2409.02346. Only the half that trains travels up.
"""

from __future__ import annotations

from fedqlora.adapter import Adapter
from fedqlora.halves import select_trained
from server.aggregation.fedavg import FedAvg


class RoLora(FedAvg):
    """The mean of the half that trained, with the other half as it was.

    Args:
        adapter: the round's starting point.
        round_: says which half trains.
    """

    def __init__(self, adapter: Adapter, round_: int) -> None:
        super().__init__(adapter, select_trained(adapter, "rolora", round_))
