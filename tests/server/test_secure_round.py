"""Rounds under secure aggregation: the centre's side, with real sites' masks and a lost few."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Error

from client.masking import Masking
from client.policy import Models, Policy
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter
from fedqlora.audit import AuditLog
from fedqlora.codec import decode
from fedqlora.config import RunConfig, validate
from fedqlora.engine.service import Identity, Service
from fedqlora.envelope import Answer, Instruction, claimed_header
from fedqlora.errors import FederationError
from fedqlora.secure.vector import Counts
from server.checkpoint import RunFolder
from server.metrics import Metrics
from server.rounds import federate
from server.traffic import describe_traffic
from tests.server.conftest import COORDINATOR, House, LearningSite, run_config, site_key

A, B = "m.lora_A.weight", "m.lora_B.weight"
FIVE = "abcde"
TARGETS = dict(zip(FIVE, (1.0, -2.0, 0.5, 3.0, -1.0), strict=True))
EXAMPLES = dict(zip(FIVE, (4, 12, 16, 1, 7), strict=True))


@dataclass
class MaskedSite(LearningSite):
    """A learning site that sends its update masked, as a trainer does."""

    name: str = ""
    state: Path = Path()
    names: str = FIVE
    wrong: bool = False
    signer: Ed25519PrivateKey | None = None
    groups: list[str] = field(default_factory=list)

    def masking(self) -> Masking:
        peers = {one: site_key(one).public_key() for one in self.names if one != self.name}
        policy = Policy(models=Models(digests=("d",)))
        key = self.signer or site_key(self.name)
        return Masking(self.name, self.state / "secagg", policy, peers, key)

    def perform(self, header: pb.Header, config: RunConfig, body: Instruction) -> Answer:
        masking = self.masking()
        if isinstance(body, pb.Confirm):
            return masking.confirm(header, body.alive)
        if isinstance(body, pb.Unmask):
            return masking.unmask(header, config, body)
        assert isinstance(body, pb.Describe | pb.Train)
        answer = super().perform(header, config, body)
        if not config.secure_aggregation.enabled:
            return answer
        if isinstance(body, pb.Describe):
            assert isinstance(answer, pb.Description)
            answer.round_key.CopyFrom(masking.renew(header.run, body.next_round))
            return answer
        assert isinstance(answer, pb.Update)
        group = masking.join(header, body.round_keys)
        self.groups.append("".join(group.sites))
        counts = Counts(
            examples=answer.examples, tokens=answer.tokens, figures=dict(answer.metrics)
        )
        masked = masking.mask(header, config, group, decode(answer.delta), counts)
        if self.wrong:
            masked.values = masked.values[:-4]
        return pb.Update(masked=masked)


def secure_config(method: str = "fedavg", enabled: bool = True, rounds: int = 2) -> RunConfig:
    values = run_config(method, min_sites=3, rounds=rounds).model_dump(mode="json")
    secure = {"enabled": enabled, "largest_value": 4.0, "answer_seconds": 1}
    return validate(RunConfig, {**values, "secure_aggregation": secure}, "run.toml")


def make_house(tmp_path: Path, config: RunConfig, names: str = FIVE) -> House:
    house = House(tmp_path, RunFolder.create(tmp_path / "runs", config))
    for name in names:
        site = MaskedSite(
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


@pytest.mark.parametrize("method", ["fedavg", "ffa", "fedsvd", "rolora"])
def test_a_masked_run_ends_as_a_plain_one_does(tmp_path: Path, method: str) -> None:
    # The sites' B has rank one, so what fedsvd makes of A's second row is anything: one round only.
    rounds = 1 if method == "fedsvd" else 2
    runs = [secure_config(method, enabled, rounds) for enabled in (False, True)]
    plain, masked = (finish(make_house(tmp_path / str(n), run)) for n, run in enumerate(runs))
    # A step of five sites is 4 / 2^28.7.
    np.testing.assert_allclose(masked[B] @ masked[A], plain[B] @ plain[A], atol=1e-6)
    if method != "fedsvd":
        np.testing.assert_allclose(masked[B], plain[B], atol=1e-6)


def test_the_centre_records_the_figures_of_all_sites_together_and_of_none(tmp_path: Path) -> None:
    house = make_house(tmp_path, secure_config(rounds=1))
    finish(house)
    lines = Metrics(house.folder.path / "metrics.jsonl").read()
    sites = [line for line in lines if line["event"] == "site"]
    assert len(sites) == 5
    assert not any({"examples", "tokens", "train_loss", "update_norm"} & set(s) for s in sites)
    (round_,) = [line for line in lines if line["event"] == "round"]
    assert (round_["examples"], round_["tokens"]) == (sum(EXAMPLES.values()), 500)
    assert round_["train_loss"] == pytest.approx(1.0)
    assert round_["opening_bytes_up"] > 0
    small = [dict(line, opening_bytes_up=0) if line is round_ else line for line in lines]
    assert describe_traffic(lines) != describe_traffic(small)


@pytest.mark.parametrize("kind", [pb.TRAIN, pb.CONFIRM, pb.UNMASK])
def test_a_site_that_is_lost_in_a_round_is_back_in_the_next_with_a_new_key(
    tmp_path: Path, kind: int
) -> None:
    house = make_house(tmp_path, secure_config(rounds=1))
    lose(house, "d", kind)
    adapter = finish(house)
    counted = {n: EXAMPLES[n] for n in FIVE if n != "d" or kind != pb.TRAIN}
    mean = sum(TARGETS[n] * w for n, w in counted.items()) / sum(counted.values())
    np.testing.assert_allclose(adapter[B], np.full((3, 2), mean / 2), atol=1e-6)

    house = make_house(tmp_path / "two", secure_config(rounds=2))
    lose(house, "d", kind)
    finish(house)
    assert outcomes(house, 1)["d"] == ("lost" if kind == pb.TRAIN else "used")
    assert outcomes(house, 2) == dict.fromkeys(FIVE, "used")
    site = house.sites["a"]
    assert isinstance(site, MaskedSite)
    assert site.groups == [FIVE, FIVE]


def test_with_too_few_left_the_run_ends_with_their_names_and_can_be_resumed(
    tmp_path: Path,
) -> None:
    house = make_house(tmp_path, secure_config())
    for name in "cd":
        lose(house, name, pb.TRAIN)
    with pytest.raises(FederationError, match=r"3 of 5 sites sent a masked update, and 4 have to"):
        finish(house)
    # The next attempt of the round is by fresh keys, as each has masked one update.
    house.grid.nodes = {n: service_of(house, n) for n in house.grid.nodes}
    finish(house)
    assert outcomes(house, 2) == dict.fromkeys(FIVE, "used")


def service_of(house: House, node: int) -> Callable[[bytes], bytes]:
    """A site as a restart of its trainer finds it."""
    name = list(house.sites)[node - 1]
    identity = Identity(name=name, key=site_key(name), coordinator=COORDINATOR.public_key())
    state = house.tmp_path / "state" / name
    audit = AuditLog(state / "audit.jsonl", identity.key)
    return Service(identity, state, house.sites[name], audit=audit).exchange


@pytest.mark.parametrize("kind", [pb.TRAIN, pb.CONFIRM, pb.UNMASK])
def test_a_serverapp_that_is_killed_in_a_round_resumes_to_the_same_end(
    tmp_path: Path, kind: int
) -> None:
    unbroken = finish(make_house(tmp_path / "unbroken", secure_config()))
    house = make_house(tmp_path, secure_config())
    answer = house.grid.nodes[4]
    killed = []

    def kill(sent: bytes) -> bytes | Error | None:
        header = claimed_header(sent)
        reply = answer(sent)
        if (header.kind, header.round) == (kind, 2) and not killed:
            killed.append(header.kind)
            raise KeyboardInterrupt
        return reply

    house.grid.nodes[4] = kill
    with pytest.raises(KeyboardInterrupt):
        finish(house)
    house.grid.nodes = {n: service_of(house, n) for n in house.grid.nodes}
    resumed = finish(house)
    assert killed
    np.testing.assert_allclose(resumed[B], unbroken[B], atol=1e-6)


def test_a_round_that_was_opened_before_the_kill_is_not_opened_for_fewer(tmp_path: Path) -> None:
    """The rule that keeps two sums from being subtracted: a resume with another set of sites."""
    house = make_house(tmp_path, secure_config())
    lose(house, "a", pb.TRAIN, round_=2)
    lose(house, "b", pb.TRAIN, round_=2)
    with pytest.raises(FederationError, match="round 2"):
        finish(house)
    house.grid.nodes = {n: service_of(house, n) for n in house.grid.nodes}
    shutil.rmtree(house.folder.path / "rounds" / "0001")
    lose(house, "e", pb.TRAIN, round_=1)
    with pytest.raises(
        FederationError, match=r"0 of 5 sites confirmed .*a: SecureAgg.*opened before"
    ):
        finish(house)
    house.grid.nodes = {n: service_of(house, n) for n in house.grid.nodes}
    finish(house)  # by the same sites it may be done again


def test_a_masked_update_of_another_size_is_left_out_and_named(tmp_path: Path) -> None:
    house = make_house(tmp_path, secure_config(rounds=1))
    site = house.sites["c"]
    assert isinstance(site, MaskedSite)
    site.wrong = True
    finish(house)
    assert outcomes(house, 1) == {**dict.fromkeys(FIVE, "used"), "c": "invalid"}


def test_a_site_without_a_key_of_its_own_cannot_take_part(tmp_path: Path) -> None:
    """A key that honest sites would refuse is found before they are asked."""
    house = make_house(tmp_path, secure_config(rounds=1))
    site = house.sites["c"]
    assert isinstance(site, MaskedSite)
    site.signer = Ed25519PrivateKey.generate()
    finish(house)
    assert "c" not in outcomes(house, 1)
    lines = Metrics(house.folder.path / "metrics.jsonl").read()
    (line,) = [line for line in lines if line["event"] == "unusable"]
    assert "not signed by that site" in line["reason"]
