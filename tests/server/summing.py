"""Sites whose updates only their sum shows, masked or encrypted as the run asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Error

from client.policy import HomomorphicEncryption, Models, Policy
from client.sums import Sums
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter
from fedqlora.audit import AuditLog
from fedqlora.codec import decode
from fedqlora.config import RunConfig, validate
from fedqlora.engine.service import Identity, Service
from fedqlora.envelope import Answer, Instruction, claimed_header
from fedqlora.secure.vector import Counts
from server.checkpoint import RunFolder
from server.metrics import Metrics
from server.rounds import federate
from tests.server.conftest import COORDINATOR, House, LearningSite, run_config, site_key

A, B = "m.lora_A.weight", "m.lora_B.weight"
FIVE = "abcde"
TARGETS = dict(zip(FIVE, (1.0, -2.0, 0.5, 3.0, -1.0), strict=True))
EXAMPLES = dict(zip(FIVE, (4, 12, 16, 1, 7), strict=True))


@dataclass
class SummingSite(LearningSite):
    """A learning site that sends its update as a trainer does; a `wrong` one cuts it short."""

    name: str = ""
    state: Path = Path()
    names: str = FIVE
    wrong: bool = False
    signer: Ed25519PrivateKey | None = None
    groups: list[str] = field(default_factory=list)

    def sums(self) -> Sums:
        peers = {one: site_key(one).public_key() for one in self.names if one != self.name}
        trusts = HomomorphicEncryption(key_sites=("b", "zebra"))
        policy = Policy(models=Models(digests=("d",)), homomorphic_encryption=trusts)
        return Sums(self.name, self.state, policy, peers, self.signer or site_key(self.name))

    def perform(self, header: pb.Header, config: RunConfig, body: Instruction) -> Answer:
        sums = self.sums()
        if not isinstance(body, pb.Describe | pb.Train):
            assert not isinstance(body, pb.Evaluate)
            return sums.answer(header, config, body)[0]
        group = sums.join(header, config, body)
        answer = super().perform(header, config, body)
        if isinstance(body, pb.Describe):
            assert isinstance(answer, pb.Description)
            round_key = sums.renew(header.run, body.next_round, config)
            if round_key is not None:
                answer.round_key.CopyFrom(round_key)
            return answer
        assert isinstance(answer, pb.Update)
        if group is None:
            return answer
        self.groups.append("".join(group.sites))
        counts = Counts(
            examples=answer.examples, tokens=answer.tokens, figures=dict(answer.metrics)
        )
        update = sums.pack(header, config, body, group, decode(answer.delta), counts)
        if self.wrong:
            update.masked.values = update.masked.values[:-4]
            del update.encrypted.ciphertexts[:]
        return update


def secure_config(method: str = "fedavg", enabled: bool = True, rounds: int = 2) -> RunConfig:
    values = run_config(method, min_sites=3, rounds=rounds).model_dump(mode="json")
    secure = {"enabled": enabled, "largest_value": 4.0, "answer_seconds": 1}
    return validate(RunConfig, {**values, "secure_aggregation": secure}, "run.toml")


def make_house(tmp_path: Path, config: RunConfig, names: str = FIVE) -> House:
    house = House(tmp_path, RunFolder.create(tmp_path / "runs", config))
    for name in names:
        site = SummingSite(
            target=TARGETS[name],
            examples=EXAMPLES[name],
            name=name,
            state=tmp_path / "state" / name,
            names=names,
        )
        house.admit(name, site)
    return house


def finish(house: House) -> Adapter:
    return federate(house.folder, house.exchange(), len(house.sites), None).adapter


def lose(house: House, name: str, kind: int, round_: int = 1) -> None:
    """Flower loses a site's message of one kind in one round, before it gets there."""
    node = list(house.sites).index(name) + 1
    answer = house.grid.nodes[node]

    def unreliable(sent: bytes) -> bytes | Error | None:
        header = claimed_header(sent)
        if (header.kind, header.round) == (kind, round_):
            return Error(1, "the node went away")
        return answer(sent)

    house.grid.nodes[node] = unreliable


def outcomes(house: House, round_: int) -> dict[str, str]:
    lines = Metrics(house.folder.path / "metrics.jsonl").read()
    return {
        line["site"]: line["outcome"]
        for line in lines
        if line["event"] == "site" and line["round"] == round_
    }


def service_of(house: House, node: int) -> Callable[[bytes], bytes]:
    """A site as a restart of its trainer finds it."""
    name = list(house.sites)[node - 1]
    identity = Identity(name=name, key=site_key(name), coordinator=COORDINATOR.public_key())
    state = house.tmp_path / "state" / name
    audit = AuditLog(state / "audit.jsonl", identity.key)
    return Service(identity, state, house.sites[name], audit=audit).exchange
