"""Sites: real trainers in one process, and what the aggregator that asks them sees.

Nothing between the two is made up: signed envelopes, the trainer's service with policy, ledger and
audit log, the codec, the masks, and the aggregator's own collector of masked updates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.ledger import make_ledger
from client.policy import Models, Policy
from client.worker import SiteWorker
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import B_PART, Adapter, AdapterSpec, FloatArray, initial_adapter
from fedqlora.audit import AuditLog
from fedqlora.codec import decode_delta, encode
from fedqlora.config import RunConfig
from fedqlora.engine.base import base_digest, resolve_base
from fedqlora.engine.model import BaseModel
from fedqlora.engine.service import Identity, Service
from fedqlora.engine.warm import WarmModel
from fedqlora.envelope import instruction_digest, sign, verify_reply
from fedqlora.errors import FederationError
from fedqlora.secure.collector import Collector
from fedqlora.secure.keys import Group
from fedqlora.secure.vector import Scale, unpack, vector_length

Rows = Sequence[Mapping[str, object]]
"""Records as a site's file holds them."""

_BODIES: dict[int, Any] = {
    pb.DESCRIPTION: pb.Description,
    pb.UPDATE: pb.Update,
    pb.CONFIRMATION: pb.Confirmation,
    pb.UNMASKING: pb.Unmasking,
    pb.REFUSAL: pb.Refusal,
}


@dataclass(frozen=True)
class Seen:
    """What the aggregator sees of one site's round.

    Attributes:
        alone: the site's own update; under secure aggregation the numbers of its masked vector.
        mean: under secure aggregation the mean update of all sites; else `alone`.
    """

    alone: Adapter
    mean: Adapter


class Sites:
    """Sites with records of their own, and an aggregator that is curious about the first one.

    Args:
        folder: empty; for records, ledgers and audit logs.
        models: folder of base models.
        base: name of the base model, which every site's policy approves; the rest of a policy is
            its defaults.
        records: of each site. Under secure aggregation all of them train, else the first alone.
    """

    def __init__(self, folder: Path, models: Path, base: str, records: Mapping[str, Rows]) -> None:
        self._models = models
        self._warm = WarmModel()
        self._coordinator = Ed25519PrivateKey.generate()
        self._keys = {name: Ed25519PrivateKey.generate() for name in records}
        policy = Policy(models=Models(digests=(base_digest(models / base),)))
        self._services = {
            name: self._open(folder / name, name, policy, rows) for name, rows in records.items()
        }
        self._issued = 0

    def base(self, config: RunConfig) -> BaseModel:
        """The public base model, which the aggregator has as well."""
        folder = resolve_base(config.model.base, self._models)
        return self._warm.get(folder, config.model, config.lora)

    def start(self, config: RunConfig) -> Adapter:
        """An adapter as in the middle of a run: with B = 0 the gradient of A would be zero.

        An aggregator may send what it likes.
        """
        adapter = initial_adapter(self.base(config).spec(), config.seed, {})
        generator = np.random.default_rng(config.seed)
        for name, value in adapter.items():
            if B_PART in name:
                value += 0.02 * generator.standard_normal(value.shape, dtype=np.float32)
        return adapter

    def see(self, config: RunConfig, adapter: Adapter) -> Seen:
        """One round of a run of its own.

        Raises:
            FederationError: a site refused.
        """
        names = list(self._services) if config.secure_aggregation.enabled else [*self._services][:1]
        run = f"run-{self._issued}"
        describe = pb.Describe(config=config.model_dump_json(), next_round=1)
        described = {name: self._ask(name, run, 0, pb.DESCRIBE, describe) for name in names}
        train = pb.Train(config=config.model_dump_json(), adapter=encode(adapter, "float32"))
        spec = AdapterSpec.of(adapter)
        if not config.secure_aggregation.enabled:
            update = self._ask(names[0], run, 1, pb.TRAIN, train)
            delta = decode_delta(update.delta, spec)
            return Seen(delta, delta)
        train.round_keys.extend(described[name].round_key for name in names)
        updates = {name: self._ask(name, run, 1, pb.TRAIN, train) for name in names}
        group = Group(run=run, round=1, keys={one.site: one.public for one in train.round_keys})
        mean = self._open_sum(config, group, spec, updates)
        return Seen(_read_masked(updates[names[0]].masked, spec), mean)

    def _open_sum(
        self, config: RunConfig, group: Group, spec: AdapterSpec, updates: Mapping[str, pb.Update]
    ) -> Adapter:
        """The mean of the masked updates, as the aggregator opens it with all sites' shares."""
        collector = Collector(group, vector_length(spec))
        for name, update in updates.items():
            collector.add(name, update.masked)
        text, run = config.model_dump_json(), group.run
        confirm = pb.Confirm(config=text, alive=collector.alive)
        signatures = {
            name: self._ask(name, run, 1, pb.CONFIRM, confirm).signature for name in updates
        }
        for name in updates:
            sealed = collector.sealed_for(name)
            unmask = pb.Unmask(config=text, signatures=signatures, sealed=sealed)
            collector.take(name, self._ask(name, run, 1, pb.UNMASK, unmask).shares)
        scale = Scale.of(config, len(updates))
        return unpack(collector.open(), spec, scale, len(updates)).mean

    def _ask(self, name: str, run: str, round_: int, kind: pb.Kind, body: Any) -> Any:
        """Send one signed instruction; returns the verified reply's body."""
        self._issued += 1
        sent = sign(
            self._coordinator,
            run=run,
            round_=round_,
            site=name,
            kind=kind,
            issued=self._issued,
            payload=body.SerializeToString(),
        )
        data = self._services[name].exchange(sent)
        key = self._keys[name].public_key()
        reply = verify_reply(data, key, site=name, instruction=instruction_digest(sent))
        answer = _BODIES[reply.header.kind].FromString(reply.payload)
        if isinstance(answer, pb.Refusal):
            raise FederationError(f"site {name} refused: {answer.sentence}")
        return answer

    def _open(self, folder: Path, name: str, policy: Policy, rows: Rows) -> Service:
        """A site's folders, and its trainer's service."""
        folder.mkdir(parents=True)
        data = folder / "records.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        key = self._keys[name]
        audit = AuditLog(folder / "audit.jsonl", key)
        make_ledger(name, folder, key)
        peers = {other: k.public_key() for other, k in self._keys.items() if other != name}
        trainer = SiteWorker(
            site=name,
            data=data,
            models=self._models,
            state=folder,
            policy=policy,
            peers=peers,
            key=key,
            audit=audit,
            warm=self._warm,
        )
        identity = Identity(name=name, key=key, coordinator=self._coordinator.public_key())
        return Service(identity, folder / "window", trainer, audit=audit)


def _read_masked(masked: pb.Masked, spec: AdapterSpec) -> Adapter:
    """A masked vector's numbers in the places of the adapter, read as if there were no mask."""
    vector = np.frombuffer(masked.values, dtype="<i4")[-spec.parameters :]
    values: FloatArray = (vector / 2**31).astype(np.float32)
    sizes = [int(np.prod(shape)) for _, shape in spec.shapes]
    parts = np.split(values, np.cumsum(sizes)[:-1])
    return {
        name: part.reshape(shape) for (name, shape), part in zip(spec.shapes, parts, strict=True)
    }
