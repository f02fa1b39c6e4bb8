"""Method: which aggregator a run's rounds use."""

from __future__ import annotations

from fedqlora.adapter import Adapter
from fedqlora.config import RunConfig
from server.aggregation.aggregate import Aggregator
from server.aggregation.exact_svd import ExactSvd
from server.aggregation.fedavg import FedAvg
from server.aggregation.fedsvd import FedSvd
from server.aggregation.ffa import Ffa
from server.aggregation.rolora import RoLora


def start_aggregation(
    config: RunConfig, round_: int, adapter: Adapter, residual: Adapter
) -> Aggregator:
    """The aggregator of one round, with nothing folded in yet.

    Args:
        config: names the method.
        round_: from 1.
        adapter: the round's starting point.
        residual: what lies frozen beside it; empty for every method but `exact_svd`.

    Raises:
        UpdateError: the method cannot aggregate this adapter.
    """
    match config.aggregation.method:
        case "fedavg":
            return FedAvg(adapter)
        case "ffa":
            return Ffa(adapter)
        case "fedsvd":
            return FedSvd(adapter)
        case "rolora":
            return RoLora(adapter, round_)
        case "exact_svd":
            return ExactSvd(
                adapter,
                residual,
                scale=config.lora.scale,
                residual_rank=config.residual_rank,
            )
