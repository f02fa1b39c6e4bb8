"""Intake: the answers of one round, each validated, recorded and folded in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, check_rank, check_update, norm, rank_of
from fedqlora.codec import decode, decode_delta
from fedqlora.config import RunConfig
from fedqlora.errors import UpdateError
from fedqlora.halves import trained_spec
from server.aggregation.aggregate import Aggregate
from server.aggregation.collected import Collected
from server.aggregation.control import ControlMean, select_control
from server.aggregation.geometry import measure_norms
from server.aggregation.method import start_aggregation
from server.answer import INVALID, Answer
from server.checkpoint import Checkpoint
from server.norms import NORMS, check_norms

_CENTRE_WRITES = (
    *("time", "event", "round", "site", "outcome", "reason"),
    *("bytes_down", "bytes_up", "examples", "tokens", "rank", "stale", *NORMS),
)
"""Names of a `site` line in metrics.jsonl that no site may give a value."""

_LONGEST_CONTROL = 1e6
"""A gradient before it is clipped may be long; a thousand sites' sum of these stays in range."""


class Intake:
    """What one round takes in; of sums alone, SecureRound or EncryptedRound takes its place.

    Args:
        config: the run.
        round_: from 1.
        before: the round's starting point.
        medians: of the norms of earlier rounds' updates; empty in the first.
        registered: number of sites that the run counts on.

    Raises:
        UpdateError: the run's method cannot aggregate this adapter.
    """

    def __init__(
        self,
        config: RunConfig,
        round_: int,
        before: Checkpoint,
        medians: Mapping[str, float],
        registered: int,
    ) -> None:
        self.round_keys: tuple[pb.RoundKey, ...] = ()
        self.encryption_key: pb.WrappedKey | None = None
        self._config = config
        self._adapter = before.adapter
        self._medians = medians
        self._lengths: dict[str, float] = {}
        self._spec = trained_spec(before.adapter, config.aggregation.method, round_)
        self._aggregator = start_aggregation(
            config, round_, before.adapter, before.residual, before.memory, medians
        )
        self._control = None
        if config.training.control_variates:
            self._control = ControlMean(select_control(before.memory, self._spec), registered)

    def fold(self, answer: Answer) -> dict[str, Any]:
        """Validate one answer and fold it in; returns what is recorded about it."""
        facts = answer.facts
        update = answer.message
        if not isinstance(update, pb.Update):
            return {**facts, "reason": answer.reason}
        try:
            delta = self._open(update)
            norms = measure_norms(self._adapter, delta, self._config.lora.scale)
            check_norms(norms, self._medians, self._config.aggregation.max_norm_ratio)
            change = {} if self._control is None else self._open_control(update)
            self._aggregator.add(answer.site, delta, _weight(update, self._config))
            if self._control is not None:
                self._control.add(answer.site, change)
            self._lengths[answer.site] = norms["update_norm"]
        except UpdateError as error:
            return {**facts, "outcome": INVALID, "reason": str(error)}
        return {
            **facts,
            "examples": update.examples,
            "tokens": update.tokens,
            **norms,
            **({"rank": rank_of(delta)} if self._config.lora.mixed_ranks else {}),
            **_figures(update),
        }

    def finish(self) -> Aggregate:
        """The next adapter, residual and memory.

        Raises:
            UpdateError: no update was taken.
        """
        result = self._aggregator.finish()
        if self._control is None:
            return result
        return replace(result, memory={**result.memory, **self._control.finish()})

    def longest(self) -> list[str]:
        """The sites whose updates were taken, the longest first."""
        return sorted(self._lengths, key=lambda site: (-self._lengths[site], site))

    def finish_without(self, site: str) -> Aggregate:
        """What the round would be without one site.

        Raises:
            UpdateError: nothing is left, or too little for the rule.
        """
        if not isinstance(self._aggregator, Collected):
            raise UpdateError("this round held no updates; set aggregation.canary before it starts")
        return self._aggregator.finish_without(site)

    def _open(self, update: pb.Update) -> Adapter:
        """The delta of an update that is what was asked for."""
        # Encodings that do not name their tensors are of the run's own rank: others are refused.
        delta = decode_delta(update.delta, self._spec)
        own = self._config.lora.rank
        rank = rank_of(delta) if self._config.lora.mixed_ranks else own
        check_rank(rank, own)
        check_update(delta, self._spec.at_rank(rank), self._config.aggregation.max_update_norm)
        return delta

    def _open_control(self, update: pb.Update) -> Adapter:
        """The change of a site's control variate."""
        change = decode(update.control)
        check_update(change, self._spec, math.inf)
        if norm(change) > _LONGEST_CONTROL:
            raise UpdateError("update's control variate is too long to be a change of gradients")
        return change


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
    return config.weight_of(update.examples, update.tokens)
