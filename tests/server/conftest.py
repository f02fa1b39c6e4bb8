"""A federation in one process: real envelopes and services, a grid that is a function call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec, lower_rank, subtract
from fedqlora.audit import AuditLog
from fedqlora.codec import decode, encode
from fedqlora.config import RunConfig, validate
from fedqlora.engine.service import Identity, Service
from fedqlora.halves import select_trained
from server.centre_log import CentreLog
from server.checkpoint import RunFolder
from server.exchange import Exchange

SPEC = AdapterSpec(shapes=(("m.lora_A.weight", (2, 4)), ("m.lora_B.weight", (3, 2))))
COORDINATOR = Ed25519PrivateKey.from_private_bytes(b"c" * 32)


def site_key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32, b"."))


def keep(delta: Adapter) -> Adapter:
    """Spoil nothing."""
    return delta


def _zeros(like: Adapter) -> Adapter:
    return {name: np.zeros_like(value) for name, value in like.items()}


@dataclass
class LearningSite:
    """A worker whose "training" moves every weight a step towards the site's own number."""

    target: float
    base_digest: str = "d" * 64
    spec: AdapterSpec = SPEC
    examples: int = 16
    spoil: Callable[[Adapter], Adapter] = keep
    rank: int | None = None
    trained: list[int] = field(default_factory=list)
    residuals: list[Adapter] = field(default_factory=list)
    controls: list[Adapter] = field(default_factory=list)
    gradient: Adapter = field(default_factory=dict)

    def perform(
        self, header: pb.Header, config: RunConfig, body: pb.Describe | pb.Train | pb.Evaluate
    ) -> pb.Description | pb.Update:
        if isinstance(body, pb.Describe):
            return pb.Description(
                base_digest=self.base_digest,
                family="causal",
                tensors=[pb.TensorShape(name=n, shape=s) for n, s in self.spec.shapes],
                given=encode({}, "float32"),
            )
        assert isinstance(body, pb.Train)
        self.trained.append(header.round)
        adapter = decode(body.adapter)
        self.residuals.append(decode(body.residual) if body.HasField("residual") else {})
        names = select_trained(adapter, config.aggregation.method, header.round)
        lower, _ = lower_rank(adapter, {}, self.rank or config.lora.rank, config.lora.scale)
        delta = {name: ((self.target - lower[name]) / 2).astype(np.float32) for name in names}
        control = None
        if body.HasField("control"):
            self.controls.append(decode(body.control))
            # Its "gradient" is how far it has to go; what leaves is the change.
            gradient = {name: 2 * value for name, value in delta.items()}
            control = encode(subtract(gradient, self.gradient or _zeros(gradient)), "float32")
            self.gradient = gradient
        return pb.Update(
            delta=encode(self.spoil(delta), config.codec.update),
            examples=self.examples,
            tokens=100,
            metrics={"train_loss": 1.0},
            control=control,
        )

    def refused(self, header: pb.Header, refusal: pb.Refusal) -> None:
        pass


class FunctionGrid:
    """Flower's Grid as the exchange uses it; a node is a function from bytes to bytes."""

    def __init__(self, nodes: dict[int, Callable[[bytes], bytes | Error | None]]) -> None:
        self.nodes = nodes
        self.slow: set[int] = set()
        self._replies: dict[str, Message] = {}
        self._held: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterator[str]:
        for message in messages:
            identifier = f"m{len(self._replies)}-{message.metadata.dst_node_id}"
            sent = message.content.array_records["envelope"]["envelope"].numpy().tobytes()
            answer = self.nodes[message.metadata.dst_node_id](sent)
            if answer is not None:
                slow = message.metadata.dst_node_id in self.slow
                (self._held if slow else self._replies)[identifier] = _reply(answer, message)
            yield identifier

    def release(self) -> None:
        """Let the replies of the slow nodes arrive."""
        self._replies |= self._held
        self._held = {}

    def pull_messages(self, identifiers: Iterable[str]) -> Iterator[Message]:
        for identifier in identifiers:
            if identifier in self._replies:
                yield self._replies.pop(identifier)


def _reply(answer: bytes | Error, to: Message) -> Message:
    if isinstance(answer, Error):
        return Message(answer, reply_to=to)
    array = Array(np.frombuffer(answer, dtype=np.uint8))
    return Message(RecordDict({"envelope": ArrayRecord({"envelope": array})}), reply_to=to)


@dataclass
class House:
    """A run folder and the sites that take part in it."""

    tmp_path: Path
    folder: RunFolder
    sites: dict[str, LearningSite] = field(default_factory=dict)
    grid: FunctionGrid = field(default_factory=lambda: FunctionGrid({}))

    def admit(self, name: str, site: LearningSite, *, started: bool = True) -> Service:
        """Add a site with its own key, service and audit log; its node id counts from 1."""
        identity = Identity(name=name, key=site_key(name), coordinator=COORDINATOR.public_key())
        state = self.tmp_path / "state" / name
        audit = AuditLog(state / "audit.jsonl", identity.key)
        if started:
            audit.append("started")
        service = Service(identity, state, site, audit=audit)
        self.sites[name] = site
        self.grid.nodes[len(self.grid.nodes) + 1] = service.exchange
        return service

    def exchange(self) -> Exchange:
        keys = {name: site_key(name).public_key() for name in self.sites}
        newest = self.folder.latest()
        issued = newest.issued if newest else 0
        history = CentreLog(self.folder.path.parent, COORDINATOR)
        return Exchange(
            self.grid,  # type: ignore[arg-type]
            COORDINATOR,
            keys,
            self.folder.name,
            issued,
            history,
        )


def run_config(
    method: str = "fedavg",
    mixed_ranks: bool = False,
    sections: Mapping[str, Mapping[str, object]] = MappingProxyType({}),
    **federation: object,
) -> RunConfig:
    settings = {"rounds": 2, "wait_seconds": 0.2, "round_deadline_seconds": 1, **federation}
    values: dict[str, Any] = {
        "model": {"base": "tiny"},
        "training": {"steps": 1, "batch_examples": 16},
        "codec": {"update": "float32"},
        "lora": {"rank": 2, "mixed_ranks": mixed_ranks},
        "aggregation": {"method": method},
        "federation": settings,
    }
    for name, more in sections.items():
        values[name] = {**values.get(name, {}), **more}
    return validate(RunConfig, values, "run.toml")


@pytest.fixture(autouse=True)
def _task_identity() -> None:
    """What Flower sets before it calls a ServerApp; its messages carry it."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


@pytest.fixture
def house(tmp_path: Path) -> House:
    """A new run of two rounds, no site yet."""
    return House(tmp_path, RunFolder.create(tmp_path / "runs", run_config()))
