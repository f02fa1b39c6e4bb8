"""The trainer: the only process of a site that sees its records.

It has no network: instructions come and replies leave through one unix socket. The base
model stays loaded between rounds; the records are read once per run, and only after the
site's policy allowed the instruction.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from client.budget import Budget
from client.ledger import Ledger, Plan
from client.policy import Policy, check, load_policy
from fedqlora import protocol_pb2 as pb
from fedqlora.audit import AuditLog
from fedqlora.codec import decode, encode
from fedqlora.config import DataConfig, RunConfig
from fedqlora.engine.base import resolve_base
from fedqlora.engine.data import Tokenized, load_records, split_records, tokenize
from fedqlora.engine.device import add_device_options, choose_device
from fedqlora.engine.dp import Unit, check_exactness, group_units, train_privately
from fedqlora.engine.model import BaseModel
from fedqlora.engine.service import Identity, Service, serve
from fedqlora.engine.train import mean_loss, train
from fedqlora.engine.warm import WarmModel
from fedqlora.errors import AuditError, DataError, FedqloraError, PolicyRefusal

log = logging.getLogger("client")

_SOFTWARE = ("bitsandbytes", "peft", "torch", "transformers")
# Below this a loss says more about single records than about learning.
MIN_EXAMPLES = 8


@dataclass(frozen=True)
class _Examples:
    """A site's examples, and whose each training example is."""

    training: list[Tokenized]
    validation: list[Tokenized]
    patients: list[str]


class Trainer:
    """Carries out what the policy allows.

    Args:
        site: the site's name.
        data: file or folder of records, never written.
        models: folder of base models, never written.
        policy: the site's rules.
        audit: the site's log; what cannot be logged is not done.
        budget: the privacy that the site's patients have spent and may spend.
        device: where it trains; None takes a GPU where there is one.
    """

    def __init__(
        self,
        *,
        site: str,
        data: Path,
        models: Path,
        policy: Policy,
        audit: AuditLog,
        budget: Budget,
        device: torch.device | None = None,
    ) -> None:
        self._site = site
        self._data = data
        self._models = models
        self._policy = policy
        self._audit = audit
        self._budget = budget
        self._warm = WarmModel(device)
        self._examples: tuple[object, _Examples] | None = None

    def perform(
        self, header: pb.Header, config: RunConfig, body: pb.Describe | pb.Train | pb.Evaluate
    ) -> pb.Description | pb.Update | pb.Evaluation:
        """Carry out one verified instruction; see engine/service.py.

        Raises:
            PolicyRefusal: the policy forbids it; no record was read.
            FedqloraError: model, data or adapter cannot be used.
        """
        if isinstance(body, pb.Evaluate):
            raise PolicyRefusal("evaluate", "a site describes and trains only; ask the evaluator")
        folder = resolve_base(config.model.base, self._models)
        digest = self._warm.digest(folder)
        check(self._policy, config, header.round, digest)
        ledger = None
        if config.privacy.unit != "none":
            ledger = self._budget.open(body.ledger_heads)
            self._budget.check(ledger, config, header.run)
        base = self._warm.get(folder, config.model, config.lora)
        data = self._read_once(base, digest, config)
        if ledger is None:
            if isinstance(body, pb.Train):
                return self._train(header, config, body, base, data.training, data.validation)
            self._record("described", header)
            return _describe(base, digest)
        units = group_units(
            data.training,
            data.patients,
            config.privacy.unit,
            config.privacy.max_examples_per_patient,
        )
        plan = self._budget.plan(ledger, config, header.run, len(units))
        if isinstance(body, pb.Train):
            return self._train_privately(header, config, body, base, digest, ledger, plan, units)
        check_exactness(base, config.training)
        self._record("described", header, ledger_head=ledger.head)
        description = _describe(base, digest)
        description.ledger_head = ledger.head
        return description

    def refused(self, header: pb.Header, refusal: pb.Refusal) -> None:
        """Write a refusal to the audit log; it stays one where that cannot be written."""
        try:
            self._record("refused", header, code=refusal.code, rule=refusal.rule)
        except AuditError as error:
            log.error("%s", error)

    def _train(
        self,
        header: pb.Header,
        config: RunConfig,
        body: pb.Train,
        base: BaseModel,
        training: list[Tokenized],
        validation: list[Tokenized],
    ) -> pb.Update:
        """One round: score the received adapter on the validation share, then train."""
        self._record("training", header)
        log.info("round %s of run %s: training", header.round, header.run)
        adapter = decode(body.adapter)
        held = validation[: config.data.validation_examples]
        before = mean_loss(base, adapter, held, config.training) if held else None
        result = train(
            base,
            adapter,
            training,
            config.training,
            seed=config.seed,
            site=self._site,
            round_=header.round,
            rounds=config.federation.rounds,
        )
        figures = {
            "examples": float(result.examples),
            "tokens": float(result.tokens),
            "train_loss": result.loss,
            "step_seconds": result.step_seconds,
        }
        if before is not None:
            figures["validation_loss"] = before
        allowed: tuple[str, ...] = self._policy.metrics.allowed
        leaving = {name: value for name, value in figures.items() if name in allowed}
        update = pb.Update(
            delta=encode(result.delta, config.codec.update),
            examples=int(leaving.pop("examples", 0)),
            tokens=int(leaving.pop("tokens", 0)),
            metrics=leaving,
        )
        self._record("trained", header, bytes_out=update.ByteSize())
        log.info(
            "round %s: %s examples, %s steps", header.round, result.examples, config.training.steps
        )
        return update

    def _train_privately(
        self,
        header: pb.Header,
        config: RunConfig,
        body: pb.Train,
        base: BaseModel,
        digest: str,
        ledger: Ledger,
        plan: Plan,
        units: list[Unit],
    ) -> pb.Update:
        """One private round: no count, loss or time of it leaves, and it is charged first."""
        self._record("training", header)
        log.info("round %s of run %s: training", header.round, header.run)
        result = train_privately(
            base,
            decode(body.adapter),
            units,
            config.training,
            clip_norm=config.privacy.clip_norm,
            noise_multiplier=plan.noise_multiplier,
            sampling_rate=plan.sampling_rate,
            round_=header.round,
            rounds=config.federation.rounds,
        )
        update = pb.Update(delta=encode(result.delta, config.codec.update))
        update.receipt = self._budget.charge(
            ledger, plan, config, header, digest, update.delta.data
        )
        update.ledger_head = ledger.head
        self._record("trained", header, bytes_out=update.ByteSize(), ledger_head=update.ledger_head)
        log.info("round %s: %s private steps", header.round, config.training.steps)
        return update

    def _read_once(self, base: BaseModel, digest: str, config: RunConfig) -> _Examples:
        """The site's examples, read and tokenized once per configuration."""
        key = (digest, config.data, config.training.max_length, config.seed)
        if self._examples is None or self._examples[0] != key:
            self._examples = (key, self._read(base, config.data, config))
        return self._examples[1]

    def _read(self, base: BaseModel, data: DataConfig, config: RunConfig) -> _Examples:
        records = load_records(self._data)
        parts = split_records(records, data.validation_fraction, config.seed)
        training, validation = (
            tokenize(part, base.tokenizer, base.family, config.training.max_length)
            for part in parts
        )
        if len(training) < MIN_EXAMPLES:
            raise DataError(
                f"site {self._site} has {len(training)} training records and needs at least "
                f"{MIN_EXAMPLES}; add records or lower data.validation_fraction"
            )
        return _Examples(training, validation, [record.patient for record in parts[0]])

    def _record(self, event: str, header: pb.Header, **facts: str | int) -> None:
        self._audit.append(event, run=header.run, round=header.round, **facts)


def _describe(base: BaseModel, digest: str) -> pb.Description:
    """What the server needs to start an adapter, and to see that all sites agree."""
    return pb.Description(
        base_digest=digest,
        family=base.family,
        tensors=[pb.TensorShape(name=name, shape=shape) for name, shape in base.spec().shapes],
        given=encode(base.given(), "float32"),
        software={name: importlib.metadata.version(name) for name in _SOFTWARE},
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a site's trainer until it is told to stop; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m client.trainer", description=__doc__)
    parser.add_argument("--site", required=True, help="the site's name")
    parser.add_argument("--data", required=True, type=Path, help="file or folder of records")
    parser.add_argument("--models", required=True, type=Path, help="folder of base models")
    parser.add_argument("--policy", required=True, type=Path, help="the site's policy.toml")
    parser.add_argument(
        "--keys", required=True, type=Path, help="folder with signing.key and coordinator.pub"
    )
    parser.add_argument(
        "--state", required=True, type=Path, help="replay window, audit log, ledger"
    )
    parser.add_argument("--socket", required=True, type=Path, help="unix socket to serve on")
    add_device_options(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        identity = Identity.load(options.site, options.keys)
        policy = load_policy(options.policy)
        trainer = Trainer(
            site=options.site,
            data=options.data,
            models=options.models,
            policy=policy,
            audit=AuditLog(options.state / "audit.jsonl"),
            budget=Budget(options.site, options.state, policy, identity.key),
            device=choose_device(options.device, options.memory_fraction),
        )
        serve(Service(identity, options.state / "window", trainer), options.socket)
    except FedqloraError as error:
        if options.debug:
            raise
        sys.stderr.write(f"trainer {options.site}: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
