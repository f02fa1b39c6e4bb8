"""Method: which aggregator a run's rounds use, and what of the updates it is given."""

from __future__ import annotations

from collections.abc import Mapping

from fedqlora.adapter import Adapter
from fedqlora.config import RunConfig
from fedqlora.halves import trained_spec
from server.aggregation.aggregate import Aggregator
from server.aggregation.collected import Collected, Updates
from server.aggregation.coordinates import take_median, take_trimmed_mean
from server.aggregation.exact_svd import ExactSvd
from server.aggregation.factors import Matrix
from server.aggregation.fedavg import FedAvg
from server.aggregation.fedopt import FedOpt
from server.aggregation.fedsvd import FedSvd
from server.aggregation.ffa import Ffa
from server.aggregation.frozen import Frozen
from server.aggregation.geometric_median import weigh_by_distance
from server.aggregation.geometry import factor_gram, product_gram, squared_distances
from server.aggregation.krum import select_by_krum
from server.aggregation.momentum import Momentum
from server.aggregation.norm_clipping import (
    NormClipping,
    clip_all,
    factor_length,
    product_length,
)
from server.aggregation.rolora import RoLora
from server.aggregation.site_privacy import SitePrivacy


def start_aggregation(
    config: RunConfig,
    round_: int,
    adapter: Adapter,
    residual: Adapter,
    memory: Adapter,
    medians: Mapping[str, float],
) -> Aggregator:
    """The aggregator of one round, with nothing folded in yet.

    Args:
        config: names the method and the rule.
        round_: from 1.
        adapter: the round's starting point.
        residual: what lies frozen beside it; methods other than `exact_svd` leave it as it is.
        memory: what the round before left to this one; empty at first.
        medians: of the norms of earlier rounds' updates; empty in the first.

    Raises:
        UpdateError: the method cannot aggregate this adapter.
        PrivacyError: no noise keeps the run's promise to its sites.
    """
    # A method that averages products measures products, every other one its factors.
    in_products = config.aggregation.method == "exact_svd"
    scale, malicious = config.lora.scale, config.aggregation.malicious_sites
    # Leaving one site out afterwards takes all updates.
    held = config.aggregation.canary is not None

    def start() -> Aggregator:
        method = _start_method(config, round_, adapter, residual, memory)
        if in_products:
            return method
        if config.server_optimizer.name != "none":
            trained = trained_spec(adapter, config.aggregation.method, round_).names
            method = FedOpt(method, adapter, trained, config.server_optimizer, memory)
        return Frozen(method, residual) if residual else method

    def measure(updates: Updates) -> Matrix:
        deltas = [delta for delta, _ in updates.values()]
        return product_gram(adapter, deltas, scale) if in_products else factor_gram(deltas)

    def select(updates: Updates) -> Updates:
        distances = squared_distances(measure(updates))
        many = config.aggregation.rule == "multi_krum"
        return select_by_krum(updates, distances, malicious, many=many)

    if config.site_privacy.enabled:
        spec = trained_spec(adapter, config.aggregation.method, round_)
        return SitePrivacy(start(), spec, config, round_, memory)
    match config.aggregation.rule:
        case "mean":
            return Collected(start, lambda updates: updates) if held else start()
        case "median":
            return Collected(start, take_median)
        case "trimmed_mean":
            return Collected(start, lambda updates: take_trimmed_mean(updates, malicious))
        case "geometric_median":
            return Collected(start, lambda updates: weigh_by_distance(updates, measure(updates)))
        case "krum" | "multi_krum":
            return Collected(start, select)
        case "norm_clipping":
            length = product_length(adapter, scale) if in_products else factor_length
            bound = medians.get("product_norm" if in_products else "update_norm", 0.0)
            if bound > 0 and not held:
                return NormClipping(start(), length, bound)
            return Collected(start, lambda updates: clip_all(updates, length, bound))


def _start_method(
    config: RunConfig, round_: int, adapter: Adapter, residual: Adapter, memory: Adapter
) -> Aggregator:
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
                momentum=_momentum(config, memory),
            )


def _momentum(config: RunConfig, memory: Adapter) -> Momentum | None:
    """Of the products. Twice all ranks hold the difference of two rounds, which it is at rate 1."""
    if config.server_optimizer.name == "none":
        return None
    return Momentum(
        beta=config.server_optimizer.momentum,
        rate=config.server_optimizer.rate,
        rank=2 * (config.lora.rank + config.residual_rank),
        memory=memory,
    )
