"""Rounds: the straight line from a configuration to a finished adapter.

gather -> start adapter -> [ask -> verify -> validate -> fold in -> save -> evaluate]*
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import AdapterSpec, check_rank, check_update, initial_adapter, norm, rank_of
from fedqlora.codec import decode_delta, encode
from fedqlora.config import RunConfig
from fedqlora.errors import FederationError, UpdateError
from fedqlora.halves import select_trained
from server.aggregation.aggregate import Aggregate, Aggregator
from server.aggregation.method import start_aggregation
from server.checkpoint import Checkpoint, Origin, RunFolder
from server.evaluation import Evaluator
from server.exchange import INVALID, Answer, Exchange
from server.history import read_history
from server.metrics import Metrics
from server.model_card import render_card
from server.peft_format import write_adapter
from server.receipts import Receipts
from server.report import refresh_report
from server.secure_round import SecureRound
from server.sites import Described, Sites

log = logging.getLogger("server")

_CENTRE_WRITES = (
    *("time", "event", "round", "site", "outcome", "reason"),
    *("bytes_down", "bytes_up", "examples", "tokens", "update_norm", "rank"),
)
"""Names of a `site` line in metrics.jsonl that no site may give a value."""


def federate(
    folder: RunFolder, exchange: Exchange, registered: int, evaluator: Evaluator | None
) -> Checkpoint:
    """Run a run folder to its end, from its newest checkpoint or from the start.

    Args:
        folder: the run; its configuration says everything else.
        exchange: how sites are asked.
        registered: number of sites in the roster.
        evaluator: scores on the held-out set; None where the run asks for none.

    Returns:
        The last round's checkpoint.

    Raises:
        FedqloraError: the run cannot go on; finished rounds are kept.
    """
    config = folder.config()
    metrics = Metrics(folder.path / "metrics.jsonl")
    checkpoint = folder.latest()
    metrics.forget_after(checkpoint.round if checkpoint else -1)
    receipts = Receipts(folder.path)
    sites = Sites(config, exchange, metrics, registered, _agreed(checkpoint), receipts)
    sites.gather(checkpoint.round + 1 if checkpoint else 1)
    if checkpoint is None:
        checkpoint = _start(config, sites, exchange)
        folder.save(checkpoint)
    _evaluate(config, checkpoint, evaluator, metrics)
    refresh_report(folder)
    for round_ in range(checkpoint.round + 1, config.federation.rounds + 1):
        folder.set_status("running", round=round_, rounds=config.federation.rounds)
        result = run_round(config, round_, checkpoint, sites, exchange, metrics)
        checkpoint = replace(
            checkpoint,
            round=round_,
            adapter=result.adapter,
            residual=result.residual,
            issued=exchange.issued,
        )
        folder.save(checkpoint)
        _evaluate(config, checkpoint, evaluator, metrics)
        refresh_report(folder)
    card = render_card(read_history(folder), checkpoint.origin)
    write_adapter(folder.path / "adapter", config, checkpoint, card)
    return checkpoint


def run_round(
    config: RunConfig,
    round_: int,
    before: Checkpoint,
    sites: Sites,
    exchange: Exchange,
    metrics: Metrics,
) -> Aggregate:
    """One round: train at every connected site, fold the updates in as they arrive.

    Returns:
        The next adapter, and the next residual.

    Raises:
        FederationError: fewer than `min_sites` usable updates came, or their masked sum cannot be
            opened; names who and why.
        UpdateError: the run's method cannot aggregate this adapter.
    """
    started = time.monotonic()
    aggregator = start_aggregation(config, round_, before.adapter, before.residual)
    names = select_trained(before.adapter, config.aggregation.method, round_)
    spec = AdapterSpec.of({name: before.adapter[name] for name in names})
    addressees = sites.online(round_)
    log.info("round %s: %s", round_, ", ".join(sorted(addressees.values())))
    secure = None
    if config.secure_aggregation.enabled:
        secure = SecureRound(config, round_, spec, addressees.values(), sites, exchange)
    outcomes: dict[str, str] = {}
    for answer in exchange.ask(
        addressees,
        pb.TRAIN,
        round_,
        _instruct(config, before, sites.receipts.heads(), secure.round_keys if secure else ()),
        config.federation.round_deadline_seconds,
    ):
        sites.receipts.keep(answer.site, answer.message)
        facts = secure.fold(answer) if secure else _fold(answer, aggregator, spec, config)
        outcomes[answer.site] = facts["outcome"]
        metrics.append("site", round=round_, site=answer.site, **facts)
        exchange.judged(round_, answer.site, facts["outcome"])
        if facts["outcome"] == "used":
            log.info("round %s: site %s's update folded in", round_, answer.site)
        else:
            log.warning(
                "round %s: site %s %s: %s", round_, answer.site, facts["outcome"], facts["reason"]
            )
    used = sum(outcome == "used" for outcome in outcomes.values())
    if used < config.federation.min_sites:
        why = ", ".join(f"{site} {outcome}" for site, outcome in sorted(outcomes.items()))
        raise FederationError(
            f"round {round_} has {used} usable updates of at least "
            f"{config.federation.min_sites} ({why}); mend those sites, then resume the run"
        )
    figures: Mapping[str, float] = {}
    if secure:
        mean, figures = secure.open()
        aggregator.add("all sites", mean, 1)
    result = aggregator.finish()
    seconds = round(time.monotonic() - started, 3)
    figures = {**figures, **result.figures}
    metrics.append("round", round=round_, sites=used, seconds=seconds, **figures)
    log.info("round %s: %s sites in %s s", round_, used, seconds)
    exchange.aggregated(
        round_,
        used,
        encode(result.adapter, "float32").data + encode(result.residual, "float32").data,
    )
    return result


def _instruct(
    config: RunConfig,
    before: Checkpoint,
    ledger_heads: Mapping[str, str],
    round_keys: Iterable[pb.RoundKey],
) -> bytes:
    """The payload of a training instruction, the same for every site."""
    train = pb.Train(
        config=config.model_dump_json(),
        adapter=encode(before.adapter, "float32"),
        residual=encode(before.residual, "float32") if before.residual else None,
        ledger_heads=ledger_heads,
        round_keys=round_keys,
    )
    return train.SerializeToString()


def _fold(
    answer: Answer, aggregator: Aggregator, spec: AdapterSpec, config: RunConfig
) -> dict[str, Any]:
    """Validate one answer and fold it in; returns what is recorded about it."""
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
        aggregator.add(answer.site, delta, _weight(update, config))
    except UpdateError as error:
        return {**facts, "outcome": INVALID, "reason": str(error)}
    return {
        **facts,
        "examples": update.examples,
        "tokens": update.tokens,
        "update_norm": norm(delta),
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


def _agreed(checkpoint: Checkpoint | None) -> Described | None:
    """What the sites of a resumed run have to hold."""
    if checkpoint is None:
        return None
    return Described(
        base_digest=checkpoint.origin.base_digest,
        family=checkpoint.origin.family,
        spec=AdapterSpec.of(checkpoint.adapter),
    )


def _start(config: RunConfig, sites: Sites, exchange: Exchange) -> Checkpoint:
    """Round 0: the adapter before any training."""
    agreed = sites.agreed
    return Checkpoint(
        round=0,
        adapter=initial_adapter(agreed.spec, config.seed, sites.given),
        residual={},
        origin=Origin(base_digest=agreed.base_digest, family=agreed.family),
        issued=exchange.issued,
    )


def _evaluate(
    config: RunConfig, checkpoint: Checkpoint, evaluator: Evaluator | None, metrics: Metrics
) -> None:
    """Score a checkpoint if one is due and not recorded yet (a resumed run may have it)."""
    due = (
        checkpoint.round % config.evaluation.every_rounds == 0
        or checkpoint.round == config.federation.rounds
    )
    done = any(
        line["event"] == "evaluation" and line["round"] == checkpoint.round
        for line in metrics.read()
    )
    if evaluator is None or not due or done:
        return
    started = time.monotonic()
    scores = evaluator.evaluate(config, checkpoint.round, checkpoint.adapter, checkpoint.residual)
    metrics.append(
        "evaluation",
        round=checkpoint.round,
        scores=scores,
        seconds=round(time.monotonic() - started, 3),
    )
    for name, values in scores.items():
        figures = ", ".join(f"{metric} {value:.4g}" for metric, value in sorted(values.items()))
        log.info("round %s: held-out %s: %s", checkpoint.round, name, figures)
