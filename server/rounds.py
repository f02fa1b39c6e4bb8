"""Rounds: the straight line from a configuration to a finished adapter.

gather -> start adapter -> [ask -> verify -> validate -> fold in -> save -> evaluate]*
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec, check_update, initial_adapter, norm
from fedqlora.codec import decode, encode
from fedqlora.config import RunConfig
from fedqlora.errors import FederationError, UpdateError
from server.aggregation.fedavg import FedAvg
from server.checkpoint import Checkpoint, Origin, RunFolder
from server.evaluation import Evaluator
from server.exchange import INVALID, Answer, Exchange
from server.metrics import Metrics
from server.peft_format import write_adapter
from server.receipts import Receipts
from server.sites import Described, Sites

log = logging.getLogger("server")


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
    sites.gather()
    if checkpoint is None:
        checkpoint = _start(config, sites, exchange)
        folder.save(checkpoint)
    _evaluate(config, checkpoint, evaluator, metrics)
    for round_ in range(checkpoint.round + 1, config.federation.rounds + 1):
        folder.set_status("running", round=round_, rounds=config.federation.rounds)
        adapter = run_round(config, round_, checkpoint.adapter, sites, exchange, metrics)
        checkpoint = replace(checkpoint, round=round_, adapter=adapter, issued=exchange.issued)
        folder.save(checkpoint)
        _evaluate(config, checkpoint, evaluator, metrics)
    write_adapter(folder.path / "adapter", config, checkpoint)
    return checkpoint


def run_round(
    config: RunConfig,
    round_: int,
    adapter: Adapter,
    sites: Sites,
    exchange: Exchange,
    metrics: Metrics,
) -> Adapter:
    """One round: train at every connected site, fold the updates in as they arrive.

    Returns:
        The next adapter.

    Raises:
        FederationError: fewer than `min_sites` usable updates came; names who and why.
    """
    started = time.monotonic()
    aggregator = FedAvg(adapter)
    spec = AdapterSpec.of(adapter)
    addressees = sites.online()
    log.info("round %s: %s", round_, ", ".join(sorted(addressees.values())))
    outcomes: dict[str, str] = {}
    for answer in exchange.ask(
        addressees,
        pb.TRAIN,
        round_,
        _instruct(config, adapter, sites.receipts.heads()),
        config.federation.round_deadline_seconds,
    ):
        sites.receipts.keep(answer.site, answer.message)
        facts = _fold(answer, aggregator, spec, config)
        outcomes[answer.site] = facts["outcome"]
        metrics.append("site", round=round_, site=answer.site, **facts)
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
    seconds = round(time.monotonic() - started, 3)
    metrics.append("round", round=round_, sites=used, seconds=seconds)
    log.info("round %s: %s sites in %s s", round_, used, seconds)
    return aggregator.finish()


def _instruct(config: RunConfig, adapter: Adapter, ledger_heads: Mapping[str, str]) -> bytes:
    """The payload of a training instruction, the same for every site."""
    train = pb.Train(
        config=config.model_dump_json(),
        adapter=encode(adapter, "float32"),
        ledger_heads=ledger_heads,
    )
    return train.SerializeToString()


def _fold(
    answer: Answer, aggregator: FedAvg, spec: AdapterSpec, config: RunConfig
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
        delta = decode(update.delta)
        check_update(delta, spec, config.aggregation.max_update_norm)
        aggregator.add(delta, _weight(update, config))
    except UpdateError as error:
        return {**facts, "outcome": INVALID, "reason": str(error)}
    return {
        **facts,
        "examples": update.examples,
        "tokens": update.tokens,
        "update_norm": norm(delta),
        **dict(update.metrics),
    }


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
    scores = evaluator.evaluate(config, checkpoint.round, checkpoint.adapter)
    metrics.append(
        "evaluation",
        round=checkpoint.round,
        scores=scores,
        seconds=round(time.monotonic() - started, 3),
    )
    for name, values in scores.items():
        figures = ", ".join(f"{metric} {value:.4g}" for metric, value in sorted(values.items()))
        log.info("round %s: held-out %s: %s", checkpoint.round, name, figures)
