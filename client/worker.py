"""The worker of a trainer: carries out a verified instruction, if the site's policy allows it.

The base model stays loaded between rounds; the records are read once per run, and only after the
policy allowed the instruction.
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from client.control import Control
from client.examples import Examples, Reader
from client.feedback import Feedback
from client.policy import Policy, check, own_training, training_rank
from client.private_round import Private, PrivateRound
from client.received import read_adapters, read_penalty
from client.sums import Sums, describe_company
from client.textfile import Textfile
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter
from fedqlora.audit import AuditLog, digest_of
from fedqlora.codec import encode
from fedqlora.config import RunConfig
from fedqlora.engine.base import resolve_base
from fedqlora.engine.dp import check_exactness
from fedqlora.engine.model import BaseModel
from fedqlora.engine.train import mean_loss, train
from fedqlora.engine.warm import WarmModel
from fedqlora.envelope import Answer, Instruction
from fedqlora.errors import AuditError, PolicyRefusal
from fedqlora.halves import trained_spec
from fedqlora.head import Head, head_facts
from fedqlora.secure.keys import Group
from fedqlora.secure.vector import Counts
from fedqlora.update import read_content

log = logging.getLogger("client")

_SOFTWARE = ("bitsandbytes", "peft", "torch", "transformers")
_RUN_LENGTH = 100
_REASON_LENGTH = 300


class SiteWorker:
    """Carries out what the policy allows.

    Args:
        site: the site's name.
        data: file or folder of records, never written.
        models: folder of base models, never written.
        state: folder of what the site keeps between rounds: what lossy encodings left out of its
            updates, its control variate, its ledger, its part in secure aggregation, metrics for
            its own monitoring.
        policy: the site's rules.
        peers: the signing keys of the sites that the policy pins (client/peers.py).
        key: the site's signing key.
        audit: the site's log; what cannot be logged is not done.
        warm: where the base model stays loaded.
    """

    def __init__(
        self,
        *,
        site: str,
        data: Path,
        models: Path,
        state: Path,
        policy: Policy,
        peers: Mapping[str, Ed25519PublicKey],
        key: Ed25519PrivateKey,
        audit: AuditLog,
        warm: WarmModel,
    ) -> None:
        self._site = site
        self._reader = Reader(site, data)
        self._models = models
        self._policy = policy
        self._audit = audit
        self._warm = warm
        self._feedback = Feedback(state / "feedback")
        self._control = Control(state / "control")
        self._textfile = Textfile(state / "metrics.prom", audit)
        self._private = Private(site, state, policy, key)
        self._sums = Sums(site, state, policy, peers, key)

    def perform(self, header: pb.Header, config: RunConfig, body: Instruction) -> Answer:
        """Carry out one verified instruction; see engine/service.py.

        Raises:
            PolicyRefusal: the policy forbids it; no record was read.
            SecureAggregationError: it would reveal more than a sum; no record was read.
            FedqloraError: model, data or adapter cannot be used.
        """
        if isinstance(body, pb.Evaluate):
            raise PolicyRefusal("evaluate", "a site describes and trains only; ask the evaluator")
        if not isinstance(body, pb.Describe | pb.Train):
            answer, event, facts = self._sums.answer(header, config, body)
            self._record(event, header, **facts)
            return answer
        folder = resolve_base(config.model.base, self._models)
        digest = self._warm.digest(folder)
        check(self._policy, config, header.round, digest, body.app_digest)
        group = self._sums.join(header, config, body)
        ledger = self._private.begin(header, config, body.ledger_heads)
        lora = config.lora.at_rank(training_rank(self._policy, config))
        base = self._warm.get(folder, config.model, lora)
        data = self._reader.read(base, digest, config, header.run)
        private = None
        if ledger is not None:
            private = self._private.plan(ledger, header, config, data, digest, body.app_digest)
        if isinstance(body, pb.Describe):
            return self._describe(header, config, body, base, digest, private)
        if private is not None:
            return self._train_privately(header, config, body, base, group, private)
        return self._train(header, config, body, base, group, data)

    def refused(self, header: pb.Header, refusal: pb.Refusal) -> None:
        """Write a refusal to the audit log; it stays one where that cannot be written."""
        try:
            self._record(
                "refused",
                header,
                decision="refused",
                code=refusal.code,
                rule=refusal.rule,
                reason=refusal.sentence[:_REASON_LENGTH],
            )
        except AuditError as error:
            log.error("%s", error)

    def _begin(
        self, header: pb.Header, config: RunConfig, body: pb.Train, base: BaseModel
    ) -> tuple[Adapter, Adapter]:
        """Write down that a round trains here; what it starts from."""
        self._record("training", header, **self._allowed(header))
        log.info("round %s of run %s: training", header.round, header.run)
        return read_adapters(base, config, body, training_rank(self._policy, config))

    def _train(
        self,
        header: pb.Header,
        config: RunConfig,
        body: pb.Train,
        base: BaseModel,
        group: Group | None,
        data: Examples,
    ) -> pb.Update:
        """One round: score the received adapter on the validation share, then train."""
        adapter, residual = self._begin(header, config, body, base)
        held = data.validation[: config.data.validation_examples]
        before = mean_loss(base, adapter, held, config.training, residual) if held else None
        spec = trained_spec(adapter, config.aggregation.method, header.round)
        correction = None
        if config.training.control_variates:
            correction = self._control.correction(
                body.control, spec, run=header.run, round_=header.round
            )
        result = train(
            base,
            adapter,
            data.training,
            own_training(self._policy, config.training),
            seed=config.seed,
            site=self._site,
            round_=header.round,
            rounds=config.federation.rounds,
            residual=residual,
            trained=spec.names,
            correction=correction,
            penalty=read_penalty(base, config, body),
            orthogonal=config.continual.orthogonal,
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
        counts = Counts(
            examples=int(leaving.pop("examples", 0)),
            tokens=int(leaving.pop("tokens", 0)),
            figures=leaving,
        )
        update = self._pack(header, config, body, group, result.delta, counts)
        if correction is not None:
            update.control.CopyFrom(
                self._control.encode(
                    result.gradient, config.codec, run=header.run, round_=header.round
                )
            )
        self._record(
            "trained",
            header,
            bytes_out=update.ByteSize(),
            tensors=digest_of(read_content(update)),
            figures=",".join(sorted(leaving)),
            **({} if correction is None else {"control": digest_of(update.control.data)}),
            **describe_company(config, group),
        )
        log.info("round %s: %s examples", header.round, result.examples)
        return update

    def _train_privately(
        self,
        header: pb.Header,
        config: RunConfig,
        body: pb.Train,
        base: BaseModel,
        group: Group | None,
        private: PrivateRound,
    ) -> pb.Update:
        """One private round: no count, loss or time of it leaves, and it is charged first."""
        adapter, residual = self._begin(header, config, body, base)
        delta = private.train(base, adapter, residual, config, header)
        update = self._pack(header, config, body, group, delta, Counts())
        private.charge(config, header, update)
        self._record(
            "trained",
            header,
            bytes_out=update.ByteSize(),
            tensors=digest_of(read_content(update)),
            ledger_head=private.ledger_head,
            **describe_company(config, group),
        )
        return update

    def _pack(
        self,
        header: pb.Header,
        config: RunConfig,
        body: pb.Train,
        group: Group | None,
        delta: Adapter,
        counts: Counts,
    ) -> pb.Update:
        """What leaves of a round: masked or encrypted where there is a group, else encoded."""
        if group is not None:
            return self._sums.pack(header, config, body, group, delta, counts)
        return pb.Update(
            delta=self._feedback.encode(delta, config.codec, run=header.run, round_=header.round),
            examples=counts.examples,
            tokens=counts.tokens,
            metrics=counts.figures,
        )

    def _describe(
        self,
        header: pb.Header,
        config: RunConfig,
        body: pb.Describe,
        base: BaseModel,
        digest: str,
        private: PrivateRound | None,
    ) -> pb.Description:
        """Round 0: what this site would train, and where its ledger stands in a private run."""
        described = _describe(base, digest, config.lora.rank)
        facts = {}
        round_key = self._sums.renew(header.run, body.next_round, config)
        if round_key is not None:
            described.round_key.CopyFrom(round_key)
        if private is not None:
            check_exactness(base, config.training)
            described.ledger_head = private.ledger_head
            facts["ledger_head"] = private.ledger_head
        self._record(
            "described",
            header,
            base=digest,
            bytes_out=described.ByteSize(),
            tensors=digest_of(described.given.data),
            **facts,
            **self._allowed(header),
        )
        return described

    def _allowed(self, header: pb.Header) -> dict[str, str | int]:
        """The policy's decision, and the coordinator's own log as it says it stands."""
        policy = digest_of(self._policy.model_dump_json().encode())
        server = Head(header.own_number, header.own_head)
        return {"decision": "allowed", "policy": policy, **head_facts("server", server)}

    def _record(self, event: str, header: pb.Header, **facts: str | int) -> None:
        # A refused header may be anybody's: its text is bounded.
        self._audit.append(event, run=header.run[:_RUN_LENGTH], round=header.round, **facts)
        self._textfile.note(event, time.time(), int(facts.get("bytes_out", 0)))


def _describe(base: BaseModel, digest: str, rank: int) -> pb.Description:
    """What the server needs to start an adapter, and to see that all sites agree."""
    # The run's rank, not this site's own: all sites start from the same adapter.
    shapes = base.spec().at_rank(rank).shapes
    return pb.Description(
        base_digest=digest,
        family=base.family,
        tensors=[pb.TensorShape(name=name, shape=shape) for name, shape in shapes],
        given=encode(base.given(), "float32"),
        software={name: importlib.metadata.version(name) for name in _SOFTWARE},
    )
