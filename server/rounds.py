"""Rounds: the straight line from a configuration to a finished adapter.

gather -> start adapter -> [ask -> verify -> validate -> fold in -> save -> evaluate]*
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec, initial_adapter
from fedqlora.codec import encode
from fedqlora.config import RunConfig
from fedqlora.continual import freeze
from fedqlora.errors import FederationError
from fedqlora.halves import trained_spec
from fedqlora.secure import ckks
from server.aggregation.aggregate import Aggregate
from server.aggregation.control import select_control
from server.aggregation.site_privacy import noise_multiplier
from server.canary import Canary
from server.checkpoint import Checkpoint, Origin, RunFolder
from server.encrypted_round import EncryptedRound
from server.evaluation import Evaluator, record_scores
from server.exchange import Exchange
from server.history import read_history
from server.intake import Intake
from server.metrics import Metrics
from server.model_card import render_card
from server.norms import running_medians
from server.peft_format import write_adapter
from server.promotion import check_measurable, check_promotion
from server.receipts import Receipts
from server.report import refresh_report
from server.sampling import sample_sites
from server.secure_round import SecureRound
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
    if config.homomorphic_encryption.enabled:
        ckks.check_installed()
    if config.site_privacy.enabled:
        noise_multiplier(config)  # a promise that cannot be kept ends the run here
    metrics = Metrics(folder.path / "metrics.jsonl")
    checkpoint = folder.latest()
    metrics.forget_after(checkpoint.round if checkpoint else -1)
    receipts = Receipts(folder.path, config, exchange)
    sites = Sites(config, exchange, metrics, registered, _agreed(checkpoint), receipts)
    sites.gather(checkpoint.round + 1 if checkpoint else 1)
    if checkpoint is None:
        checkpoint = _start(config, sites, exchange)
        folder.save(checkpoint)
    _evaluate(config, checkpoint, evaluator, metrics)
    check_measurable(folder, config)
    anchor: Adapter = {}
    if config.continual.penalty > 0:
        start = folder.start()
        anchor = freeze(start.adapter, start.residual, config.lora.scale)
    canary = None
    if config.aggregation.canary is not None and evaluator is not None:
        canary = Canary(config, config.aggregation.canary, evaluator, metrics)
    refresh_report(folder)
    for round_ in range(checkpoint.round + 1, config.federation.rounds + 1):
        folder.set_status("running", round=round_, rounds=config.federation.rounds)
        result = run_round(config, round_, checkpoint, sites, exchange, metrics, canary, anchor)
        checkpoint = replace(
            checkpoint,
            round=round_,
            adapter=result.adapter,
            residual=result.residual,
            memory=result.memory,
            issued=exchange.issued,
        )
        folder.save(checkpoint)
        _evaluate(config, checkpoint, evaluator, metrics)
        refresh_report(folder)
    check_promotion(folder, config)
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
    canary: Canary | None,
    anchor: Adapter,
) -> Aggregate:
    """One round: train at every connected site, fold the updates in as they arrive.

    The anchor is what `continual.penalty` holds the products to; empty where there is none.

    Returns:
        The next adapter, and the next residual.

    Raises:
        FederationError: fewer than `min_sites` usable updates came, or their sum cannot be
            opened; names who and why.
        UpdateError: the run's method cannot aggregate this adapter.
    """
    started = time.monotonic()
    excluded = canary.excluded() if canary else {}
    here = {node: site for node, site in sites.online(round_).items() if site not in excluded}
    asked = sample_sites(config, round_, here.values())
    absent = excluded | dict.fromkeys(set(here.values()) - asked, "not in this round's sample")
    addressees = {node: site for node, site in here.items() if site in asked}
    log.info("round %s: %s", round_, ", ".join(sorted(addressees.values())))
    intake: Intake | SecureRound | EncryptedRound
    if config.secure_aggregation.enabled:
        intake = SecureRound(config, round_, before, addressees.values(), sites, exchange)
    elif config.homomorphic_encryption.enabled:
        intake = EncryptedRound(config, round_, before, addressees, sites, exchange)
    else:
        # Held to the others' norms, one site would decide about another's update.
        medians = {} if config.site_privacy.enabled else running_medians(metrics.read())
        intake = Intake(config, round_, before, medians, sites.expected)
    outcomes = dict(excluded)
    for answer in exchange.ask(
        addressees,
        pb.TRAIN,
        round_,
        _instruct(config, round_, before, sites.receipts.heads(), intake, anchor, exchange.app),
        config.federation.round_deadline_seconds,
        use_late=config.federation.late_updates == "use",
    ):
        answer = sites.receipts.take(answer, round_, sites.agreed.base_digest)
        if answer.site in excluded:
            continue
        absent.pop(answer.site, None)
        facts = intake.fold(answer)
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
    result = intake.finish()
    # A round of which the sum alone is open shows no update; a canary is refused with it.
    if canary is not None and isinstance(intake, Intake):
        result = canary.judge(round_, before, intake, result)
    seconds = round(time.monotonic() - started, 3)
    metrics.append(
        "round",
        round=round_,
        sites=used,
        seconds=seconds,
        set_aside=result.set_aside,
        absent=absent,
        **result.figures,
    )
    log.info("round %s: %s sites in %s s", round_, used, seconds)
    exchange.aggregated(
        round_,
        used,
        encode(result.adapter, "float32").data + encode(result.residual, "float32").data,
    )
    return result


def _instruct(
    config: RunConfig,
    round_: int,
    before: Checkpoint,
    ledger_heads: Mapping[str, str],
    intake: Intake | SecureRound | EncryptedRound,
    anchor: Adapter,
    app: str,
) -> bytes:
    """The payload of a training instruction, the same for every site."""
    control = None
    if config.training.control_variates:
        spec = trained_spec(before.adapter, config.aggregation.method, round_)
        control = encode(select_control(before.memory, spec), "float32")
    train = pb.Train(
        config=config.model_dump_json(),
        adapter=encode(before.adapter, "float32"),
        residual=encode(before.residual, "float32") if before.residual else None,
        control=control,
        anchor=encode(anchor, "float32") if anchor else None,
        ledger_heads=ledger_heads,
        round_keys=intake.round_keys,
        encryption_key=intake.encryption_key,
        app_digest=app,
    )
    return train.SerializeToString()


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
    record_scores(metrics, checkpoint.round, scores, time.monotonic() - started)
