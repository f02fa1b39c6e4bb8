"""A trainer under secure aggregation: a round with two peers, and what it refuses on record."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from client.policy import Privacy, SecureAggregation
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import AdapterSpec, check_update
from fedqlora.codec import decode
from fedqlora.config import RunConfig, validate
from fedqlora.engine.service import Service
from fedqlora.errors import ConfigError
from fedqlora.halves import select_trained
from fedqlora.privacy.noise import SecureNoise
from fedqlora.privacy.receipts import open_receipt
from fedqlora.secure.collector import Collector
from fedqlora.secure.keys import Group
from fedqlora.secure.masks import to_bytes
from fedqlora.secure.participant import Participant
from fedqlora.secure.state import Secrets
from fedqlora.secure.vector import Counts, Scale, Total, pack, unpack, vector_length
from tests.client import test_private, test_worker
from tests.client.test_worker import SITE, Site, ask, describe, exchange, instruct, parse
from tests.fedqlora.secure.house import signing_key

site = test_worker.site
_opened = test_worker._opened
MASKED = {
    "aggregation": {"method": "fedavg"},
    "federation": {"min_sites": 3, "rounds": 2},
    "secure_aggregation": {"enabled": True},
}
PEERS = ("b", "c", "d")
KEYS = {"a": SITE, **{name: signing_key(name) for name in PEERS}}


@pytest.fixture
def pinned(site: Site) -> Site:
    """A site whose policy pins three peers."""
    site.peers = {name: KEYS[name].public_key() for name in PEERS}
    return site


@dataclass
class Round:
    """One round of a real trainer `a` and its peers, whose deltas are zero."""

    site: Site
    config: RunConfig
    round: int = 1
    issued: int = 0
    peers: dict[str, Participant] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in PEERS:
            known = {other: key.public_key() for other, key in KEYS.items() if other != name}
            secrets = Secrets.make("r", self.round)
            self.peers[name] = Participant(name, KEYS[name], known, 3, secrets)

    def service(self) -> Service:
        """As a restart builds it: every step of a round is by another."""
        return self.site.service()

    def ask(self, kind: pb.Kind, body: Any) -> Any:
        self.issued += 1
        sent = exchange(self.service(), kind, body, self.issued, round_=self.round)
        return parse(*sent)

    def describe(self) -> pb.Description:
        message = describe(self.config)
        message.next_round = self.round
        answer = self.ask(pb.DESCRIBE, message)
        assert isinstance(answer, pb.Description), answer
        return answer

    def keys(self, description: pb.Description, peers: str = "bcd") -> list[pb.RoundKey]:
        return [description.round_key, *(self.peers[name].advertise() for name in peers)]

    def train(self, peers: str = "bcd") -> pb.Update | pb.Refusal:
        """Describe and train; afterwards `collector` has everybody's masked update."""
        description = self.describe()
        train, spec = instruct(self.config, description)
        names = select_trained(dict(spec.shapes), self.config.aggregation.method, self.round)
        self.spec = AdapterSpec(shapes=tuple(one for one in spec.shapes if one[0] in names))
        train.round_keys.extend(self.keys(description, peers))
        return self.train_with(train, peers)

    def train_with(self, train: pb.Train, peers: str = "bcd") -> pb.Update | pb.Refusal:
        answer = self.ask(pb.TRAIN, train)
        if isinstance(answer, pb.Refusal):
            return answer
        keys = {one.site: one.public for one in train.round_keys}
        group = Group(run="r", round=self.round, keys=keys)
        self.scale = Scale.of(self.config, len(keys))
        self.collector = Collector(group, vector_length(self.spec))
        self.collector.add("a", answer.masked)
        for name in peers:
            zeros = {name: np.zeros(shape, np.float32) for name, shape in self.spec.shapes}
            vector = pack(zeros, Counts(weight=1), self.scale, SecureNoise().uniform)
            sealed = self.peers[name].mask(self.peers[name].join(train.round_keys), vector)
            self.collector.add(name, pb.Masked(values=to_bytes(vector), sealed=sealed))
        return answer

    def confirm(self, alive: Any = None) -> pb.Confirmation | pb.Refusal:
        listed = self.collector.alive if alive is None else alive
        body = pb.Confirm(config=self.config.model_dump_json(), alive=listed)
        return self.ask(pb.CONFIRM, body)  # type: ignore[no-any-return]

    def unmask(self, signatures: dict[str, bytes]) -> pb.Unmasking | pb.Refusal:
        body = pb.Unmask(
            config=self.config.model_dump_json(),
            signatures=signatures,
            sealed=self.collector.sealed_for("a"),
        )
        return self.ask(pb.UNMASK, body)  # type: ignore[no-any-return]

    def finish(self) -> Total:
        """Confirm, unmask and open the sum of the whole round."""
        confirmation = self.confirm()
        assert isinstance(confirmation, pb.Confirmation), confirmation
        alive = self.collector.alive
        signatures = {n: self.peers[n].confirm(alive) for n in alive if n != "a"}
        signatures["a"] = confirmation.signature
        unmasking = self.unmask(signatures)
        assert isinstance(unmasking, pb.Unmasking), unmasking
        self.next_key = unmasking.round_key
        self.collector.take("a", unmasking.shares)
        for name in alive[1:]:
            sealed = self.collector.sealed_for(name)
            self.collector.take(name, self.peers[name].unmask(signatures, sealed))
        return unpack(self.collector.open(), self.spec, self.scale, len(alive))


def masked_config(**sections: dict[str, object]) -> RunConfig:
    return test_worker.run_config(**{**MASKED, **sections})


def last(site: Site) -> dict[str, Any]:
    return site.audit()[-1]


def test_a_masked_round_opens_to_the_delta_that_a_plain_one_sends(pinned: Site) -> None:
    here = Round(pinned, masked_config())
    update = here.train()
    assert isinstance(update, pb.Update)
    assert not update.HasField("delta")
    assert (update.examples, update.tokens, dict(update.metrics)) == (0, 0, {})
    total = here.finish()

    plain = test_worker.run_config(
        aggregation={"method": "fedavg"}, codec={"update": "float32"}, federation={"rounds": 2}
    )
    service = pinned.service()
    train, spec = instruct(plain, test_worker.described(service, plain, 100))
    sent = ask(service, pb.TRAIN, train, 101)
    # The peers' weight is one each, and their deltas are zero.
    weight = sent.examples + 3
    step = here.scale.most_weight / here.scale.steps / weight
    for name, value in decode(sent.delta).items():
        exact = value * (sent.examples / weight)
        np.testing.assert_allclose(total.mean[name], exact, atol=5 * step)
    assert (total.examples, total.tokens) == (sent.examples, sent.tokens)
    assert total.figures["train_loss"] == pytest.approx(sent.metrics["train_loss"], abs=1e-4)
    check_update(total.mean, spec, 100)
    events = [line["event"] for line in pinned.audit()][:5]
    assert events == ["described", "training", "trained", "confirmed", "unmasked"]
    assert pinned.audit()[2]["masked_with"] == "a,b,c,d"


def test_the_key_of_the_next_round_comes_with_the_shares_and_is_good_for_it(pinned: Site) -> None:
    first = Round(pinned, masked_config())
    description = first.describe()
    train, spec = instruct(first.config, description)
    train.round_keys.extend(first.keys(description))
    first.spec = spec
    first.train_with(train)
    first.finish()
    second = Round(pinned, masked_config(), round=2, issued=first.issued)
    second.spec = spec
    del train.round_keys[:]
    train.round_keys.extend([first.next_key, *(p.advertise() for p in second.peers.values())])
    assert isinstance(second.train_with(train), pb.Update)
    second.finish()
    assert not second.next_key.public, "the last round needs no next key"


def test_secrets_on_the_disk_are_the_owners_only(pinned: Site) -> None:
    Round(pinned, masked_config()).describe()
    (file,) = (pinned.folder / "secagg").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text("{}")
    refusal = Round(pinned, masked_config(), issued=5).ask(pb.DESCRIBE, describe(masked_config()))
    assert refusal.code == "DataError"
    assert str(file) not in refusal.sentence


@pytest.mark.parametrize("method", ["fedavg", "ffa"])
def test_a_private_round_is_masked_too_and_its_receipt_is_over_the_masked_bytes(
    pinned: Site, method: str
) -> None:
    test_private.begin(pinned)
    secure = {**MASKED, "aggregation": {"method": method, "weighting": "uniform"}}
    here = Round(pinned, test_private.private_config(**secure))
    update = here.train()
    assert isinstance(update, pb.Update), update
    receipt = open_receipt(update.receipt, {"a": SITE.public_key()})
    assert receipt.update_digest == test_worker.hashlib.sha256(update.masked.values).hexdigest()
    total = here.finish()
    assert (total.examples, total.tokens, total.figures) == (0, 0, {})
    assert all(value.any() for value in total.mean.values())
    assert ("lora_A" in "".join(total.mean)) == (method == "fedavg")


Refuse = Callable[[Round], pb.Refusal]


def swap(here: Round) -> Any:
    description = here.describe()
    train, _ = instruct(here.config, description)
    keys = here.keys(description)
    keys[1].public = bytes(31) + b"\x09"
    train.round_keys.extend(keys)
    return here.train_with(train)


def replay(here: Round) -> Any:
    here.train()
    here.finish()
    again = Round(here.site, here.config, issued=here.issued)
    again.train("bc")
    return again.confirm()


def split_view(here: Round) -> Any:
    here.train()
    here.confirm()
    other = here.collector.alive[:3]
    wrong = here.collector.group.alive_statement(other)
    signatures = {name: KEYS[name].sign(wrong) for name in "bcd"}
    return here.unmask(signatures)


def unmask_twice(here: Round) -> Any:
    here.train()
    here.finish()
    # Also with a new number, and after the round's key was replaced by the next one.
    return here.unmask({})


def another_list(here: Round) -> Any:
    here.train()
    assert isinstance(here.confirm(), pb.Confirmation)
    return here.confirm(here.collector.alive[:3])


def without_it(here: Round) -> Any:
    here.train()
    return here.confirm(["b", "c", "d"])


def two_survivors(here: Round) -> Any:
    here.train()
    return here.confirm(["a", "b"])


ATTACKS = {
    "a swapped key": (swap, "secure_aggregation.keys", "not signed by that site"),
    "a round done again for fewer": (replay, "secure_aggregation.replay", "opened before"),
    "two lists of survivors": (split_view, "secure_aggregation.signatures", "different lists"),
    "unmasking twice": (unmask_twice, "secure_aggregation.round", "no key for round 1"),
    "another list after the first": (another_list, "secure_aggregation.once", "already done"),
    "calling it lost": (without_it, "secure_aggregation.survivors", "which has sent its update"),
    "two survivors": (two_survivors, "secure_aggregation.survivors", "a sum of 2 of 4"),
    "two sites": (lambda h: h.train("b"), "secure_aggregation.sites", "a sum of 2 sites"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_and_the_audit_log_says_why(pinned: Site, name: str) -> None:
    attack, rule, reason = ATTACKS[name]
    refusal = attack(Round(pinned, masked_config()))
    assert isinstance(refusal, pb.Refusal), refusal
    assert (refusal.code, refusal.rule) == ("SecureAggregationError", rule)
    assert reason in refusal.sentence
    line = last(pinned)
    assert (line["event"], line["rule"], line["decision"]) == ("refused", rule, "refused")
    assert reason in line["reason"]


def test_a_site_that_the_policy_does_not_pin_does_not_count_and_no_record_is_read(
    pinned: Site,
) -> None:
    """A coordinator that plays all sites but this one has keys for them, but nobody pinned them."""
    del pinned.peers["d"]
    here = Round(pinned, masked_config())
    description = here.describe()
    train, _ = instruct(here.config, description)
    train.round_keys.extend(here.keys(description))
    _opened.clear()
    refusal = here.train_with(train)
    assert isinstance(refusal, pb.Refusal)
    assert refusal.rule == "secure_aggregation.peers"
    assert "pins no key of site d" in last(pinned)["reason"]
    assert str(pinned.folder / "records.jsonl") not in _opened


@pytest.mark.parametrize(("peers", "sites"), [((), 3), (("b",), 3), (("b", "c", "d"), 5)])
def test_a_site_with_too_few_pinned_peers_refuses_before_the_run(
    pinned: Site, peers: tuple[str, ...], sites: int
) -> None:
    pinned.peers = {name: pinned.peers[name] for name in peers}
    rules = SecureAggregation(required=True, sites=sites)
    pinned.policy = pinned.policy.model_copy(update={"secure_aggregation": rules})
    _opened.clear()
    refusal = ask(pinned.service(), pb.DESCRIBE, describe(masked_config()), 1)
    assert (refusal.code, refusal.rule) == ("PolicyRefusal", "secure_aggregation.sites")
    assert f"pins {len(peers)} others" in last(pinned)["reason"]
    assert str(pinned.folder / "records.jsonl") not in _opened


def test_a_policy_that_requires_it_refuses_a_plain_run_in_every_step(pinned: Site) -> None:
    rules = SecureAggregation(required=True)
    pinned.policy = pinned.policy.model_copy(update={"secure_aggregation": rules})
    plain = test_worker.run_config()
    _opened.clear()
    for issued, (kind, body) in enumerate(
        [
            (pb.DESCRIBE, describe(plain)),
            (pb.TRAIN, pb.Train(config=plain.model_dump_json())),
        ],
        start=1,
    ):
        refusal = ask(pinned.service(), kind, body, issued)
        assert refusal.rule == "secure_aggregation.required"
        assert "in a sum only" in last(pinned)["reason"]
    assert str(pinned.folder / "records.jsonl") not in _opened


def test_an_instruction_that_came_before_gets_its_stored_reply_and_nothing_is_done_twice(
    pinned: Site,
) -> None:
    here = Round(pinned, masked_config())
    here.train()
    body = pb.Confirm(config=here.config.model_dump_json(), alive=here.collector.alive)
    sent, first = exchange(pinned.service(), pb.CONFIRM, body, 50)
    assert pinned.service().exchange(sent) == first
    assert [line["event"] for line in pinned.audit()].count("confirmed") == 1


def test_an_update_with_a_value_out_of_range_is_refused_and_not_masked(pinned: Site) -> None:
    config = masked_config(secure_aggregation={"enabled": True, "largest_value": 1e-6})
    refusal = Round(pinned, config).train()
    assert isinstance(refusal, pb.Refusal)
    assert refusal.code == "UpdateError"
    assert "above the run's largest_value = 1e-06" in last(pinned)["reason"]


def test_a_policy_below_three_sites_is_refused() -> None:
    with pytest.raises(ConfigError, match="greater than or equal to 3"):
        validate(SecureAggregation, {"sites": 2}, "policy.toml")


def test_the_policys_privacy_holds_under_masks(pinned: Site) -> None:
    privacy = Privacy(unit="patient", epsilon=9.0, delta=0.01)
    pinned.policy = pinned.policy.model_copy(update={"privacy": privacy})
    refusal = ask(pinned.service(), pb.DESCRIBE, describe(masked_config()), 1)
    assert refusal.rule == "privacy.unit"


def test_the_layout_is_the_specs(pinned: Site) -> None:
    here = Round(pinned, masked_config())
    update = here.train()
    assert isinstance(update, pb.Update)
    spec = AdapterSpec(shapes=here.spec.shapes)
    assert len(update.masked.values) == 4 * vector_length(spec)
    # Beside four bytes a value: shares for four sites, and the receipt's place is empty.
    assert update.ByteSize() < 4 * spec.parameters + 2000
