"""Validation: whether a site's answer can be folded in, and what is recorded about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec, check_rank, check_update, rank_of
from fedqlora.codec import decode_delta
from fedqlora.config import RunConfig
from fedqlora.errors import UpdateError
from server.aggregation.aggregate import Aggregator
from server.aggregation.geometry import measure_norms
from server.exchange import INVALID, Answer
from server.norms import NORMS, check_norms

_CENTRE_WRITES = (
    *("time", "event", "round", "site", "outcome", "reason"),
    *("bytes_down", "bytes_up", "examples", "tokens", "rank", *NORMS),
)
"""Names of a `site` line in metrics.jsonl that no site may give a value."""


def fold(
    answer: Answer,
    aggregator: Aggregator,
    adapter: Adapter,
    spec: AdapterSpec,
    medians: Mapping[str, float],
    config: RunConfig,
) -> dict[str, Any]:
    """Validate one answer and fold it in; returns what is recorded about it.

    Args:
        answer: what came back from one site.
        aggregator: takes its update.
        adapter: the round's starting point.
        spec: names and shapes of what trained of it.
        medians: of earlier rounds' norms.
        config: the run.
    """
    facts: dict[str, Any] = {
        "outcome": answer.failure or "used",
        "bytes_down": answer.sent_bytes,
        "bytes_up": answer.received_bytes,
    }
    update = answer.message
    if not isinstance(update, pb.Update):
        return {**facts, "reason": answer.reason}
    try:
        # Encodings that do not name their tensors are of the run's own rank: others are refused.
        delta = decode_delta(update.delta, spec)
        rank = rank_of(delta) if config.lora.mixed_ranks else config.lora.rank
        check_rank(rank, config.lora.rank)
        check_update(delta, spec.at_rank(rank), config.aggregation.max_update_norm)
        norms = measure_norms(adapter, delta, config.lora.scale)
        check_norms(norms, medians, config.aggregation.max_norm_ratio)
        aggregator.add(answer.site, delta, _weight(update, config))
    except UpdateError as error:
        return {**facts, "outcome": INVALID, "reason": str(error)}
    return {
        **facts,
        "examples": update.examples,
        "tokens": update.tokens,
        **norms,
        **({"rank": rank} if config.lora.mixed_ranks else {}),
        **_figures(update),
    }


def _figures(update: pb.Update) -> dict[str, float]:
    """A site's own figures; those under a name that the centre writes itself are left out."""
    return {name: value for name, value in update.metrics.items() if name not in _CENTRE_WRITES}


def _weight(update: pb.Update, config: RunConfig) -> int:
    """A site's weight; one that it cannot have earned is refused, not cut down.

    Raises:
        UpdateError: more examples or tokens than the round's steps hold.
    """
    most = config.training.steps * config.training.batch_examples
    if update.examples > most or update.tokens > most * config.training.max_length:
        raise UpdateError(
            f"update claims {update.examples} examples and {update.tokens} tokens, "
            f"more than {config.training.steps} steps hold"
        )
    weights = {"examples": update.examples, "tokens": update.tokens, "uniform": 1}
    return int(weights[config.aggregation.weighting])
