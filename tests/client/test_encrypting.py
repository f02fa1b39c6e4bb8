"""A trainer under homomorphic encryption: a round with peers, and what it refuses on record."""

from __future__ import annotations

import hashlib
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import client.encrypting
from client.encrypting import Encrypting
from client.policy import HomomorphicEncryption, Models, Policy, SecureAggregation
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import AdapterSpec
from fedqlora.codec import decode
from fedqlora.config import RunConfig
from fedqlora.errors import EncryptionError, SecureAggregationError
from fedqlora.privacy.receipts import open_receipt
from fedqlora.secure import ckks
from fedqlora.secure.masks import from_bytes
from fedqlora.secure.vector import Counts, Scale, Total, unpack, vector_length
from tests.client import test_private, test_worker
from tests.client.test_worker import SITE, Site, ask, describe, exchange, instruct, parse
from tests.fedqlora.secure.house import signing_key

site = test_worker.site
_opened = test_worker._opened
NAMES = "abcd"
KEYS = {"a": SITE, **{name: signing_key(name) for name in "bcd"}}
POLICY = Policy(models=Models(digests=("d",)))


def encrypted_config(key_site: str = "b", **sections: dict[str, object]) -> RunConfig:
    return test_worker.run_config(
        **{
            "aggregation": {"method": "ffa"},
            "federation": {"min_sites": 3, "rounds": 2},
            "homomorphic_encryption": {"enabled": True, "key_site": key_site},
            **sections,
        }
    )


@dataclass
class Round:
    """One round of four sites whose deltas are one number each; key site b."""

    folder: Path
    config: RunConfig = field(default_factory=encrypted_config)
    number: int = 1
    round_keys: dict[str, pb.RoundKey] = field(default_factory=dict)
    updates: dict[str, pb.Update] = field(default_factory=dict)

    @property
    def header(self) -> pb.Header:
        return pb.Header(run="r", round=self.number)

    def site(self, name: str, key: Ed25519PrivateKey | None = None) -> Encrypting:
        """A site as a restart of its trainer finds it."""
        peers = {other: KEYS[other].public_key() for other in NAMES if other != name}
        return Encrypting(name, self.folder / name, POLICY, peers, key or KEYS[name])

    def describe(self, names: str = NAMES) -> None:
        self.round_keys = {name: self.site(name).renew("r", self.number) for name in names}

    def wrap(self, by: str = "b") -> pb.WrappedKey:
        return self.site(by).wrap(self.header, self.config, self.wrap_body())

    def wrap_body(self) -> pb.Wrap:
        return pb.Wrap(round_keys=self.round_keys.values())

    def train(self, names: str = NAMES) -> None:
        """Everything up to the sum."""
        self.describe()
        wrapped = self.wrap()
        for name in names:
            self.updates[name] = self.encrypt(name, wrapped)

    def encrypt(self, name: str, wrapped: pb.WrappedKey) -> pb.Update:
        here = self.site(name)
        group = here.join(self.header, list(self.round_keys.values()))
        delta = {"m.lora_B.weight": np.full((2, 1), ord(name) / 200, dtype=np.float32)}
        counts = Counts(examples=1)
        return here.encrypt(self.header, self.config, group, wrapped, delta, counts)

    def sum_of(self, names: str) -> list[bytes]:
        total = ckks.CiphertextSum(1)
        for name in names:
            total.add(name, self.updates[name].encrypted.ciphertexts)
        return total.ciphertexts()

    def decrypt(self, alive: str = NAMES, content: str | None = None, by: str = "b") -> float:
        """What the coordinator takes for the mean; of other sites' updates where `content` says."""
        checksums = {name: self.updates[name].encrypted.checksum for name in self.updates}
        body = pb.Decrypt(
            alive=list(alive), ciphertexts=self.sum_of(content or alive), checksums=checksums
        )
        values = self.site(by).decrypt(self.header, self.config, body).values
        spec = AdapterSpec(shapes=(("m.lora_B.weight", (2, 1)),))
        scale = Scale.of(self.config, len(self.round_keys))
        total = unpack(from_bytes(values), spec, scale, len(content or alive))
        assert len(values) >= 4 * vector_length(spec)
        return float(total.mean["m.lora_B.weight"][0, 0])


def mean_of(names: str) -> float:
    return sum(ord(name) for name in names) / 200 / len(names)


def test_the_key_site_decrypts_the_sum_of_those_who_sent(tmp_path: Path) -> None:
    here = Round(tmp_path)
    here.train("abd")
    assert here.decrypt("abd") == pytest.approx(mean_of("abd"), abs=1e-7)
    for name in NAMES:
        (file,) = (tmp_path / name).iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert (name == "b") == ('"opened": {"1": ["a", "b", "d"]}' in file.read_text())


def test_a_single_update_in_the_place_of_the_sum_is_given_away_without_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a coordinator would do: ask for the sum of four, hand over the ciphertexts of one."""
    here = Round(tmp_path / "open")
    here.train()
    with monkeypatch.context() as patch:
        patch.setattr(client.encrypting, "checksum", lambda *_: np.zeros(4, np.uint64))
        patch.setattr(client.encrypting, "add_checksums", lambda *_: np.zeros(4, np.uint64))
        assert here.decrypt(NAMES, "a") == pytest.approx(mean_of("a"), abs=1e-7)

    here = Round(tmp_path / "shut")
    here.train()
    with pytest.raises(EncryptionError, match="is not the sum of the updates of a, b, c, d"):
        here.decrypt(NAMES, "a")
    # Nor is there a second try, in which the key could be searched for by what is refused.
    with pytest.raises(EncryptionError, match="decrypts once"):
        here.decrypt()


def _less_one(here: Round) -> Any:
    """Two sums of a round that differ by one site."""
    here.train()
    here.decrypt()
    again = Round(here.folder)
    again.train("abc")
    return again.decrypt("abc")


def _twice(here: Round) -> Any:
    here.train()
    here.decrypt()
    return Round(here.folder, number=1, updates=here.updates).decrypt()


def _other_round(here: Round) -> Any:
    """Last round's update of site a among this round's."""
    here.train()
    old = here.updates["a"]
    here.decrypt()
    here = Round(here.folder, number=2)
    here.train()
    here.updates["a"] = old
    return here.decrypt()


def _two(here: Round) -> Any:
    here.train("ab")
    return here.decrypt("ab")


def _named_twice(here: Round) -> Any:
    here.train("ab")
    return here.decrypt("aab", "ab")


def _another_holder(here: Round) -> Any:
    here.describe()
    return here.wrap("c")


def _own_key(here: Round) -> Any:
    """A key that the coordinator has made, under which it could read everything."""
    here.describe()
    mine = Round(here.folder / "mine", config=here.config)
    mine.describe()
    return here.encrypt("a", mine.wrap())


def _own_round_key(here: Round) -> Any:
    here.describe()
    here.round_keys["c"].public = bytes(31) + b"\x09"
    return here.wrap()


def _stranger(here: Round) -> Any:
    """A site that nobody has pinned, so that the key is not wrapped for it."""
    here.describe()
    stranger = Encrypting("e", here.folder / "e", POLICY, {}, signing_key("e"))
    here.round_keys["e"] = stranger.renew("r", 1)
    return here.wrap()


def _two_keys(here: Round) -> Any:
    here.describe()
    here.wrap()
    return here.wrap()


ATTACKS: dict[str, tuple[Callable[[Round], Any], str, str]] = {
    "a second sum without one site": (_less_one, "homomorphic_encryption.replay", "lies between"),
    "the same sum again": (_twice, "homomorphic_encryption.round", "no key for round 1"),
    "an update of another round": (_other_round, "homomorphic_encryption.sum", "not its own"),
    "two sites": (_two, "homomorphic_encryption.sites", "a sum of 2 sites"),
    "a site named twice": (_named_twice, "homomorphic_encryption.sites", "named once"),
    "another site as holder": (_another_holder, "homomorphic_encryption.key_site", "not hold"),
    "the coordinator's own key": (_own_key, "homomorphic_encryption.key", "not wrapped by site b"),
    "a swapped round key": (_own_round_key, "secure_aggregation.keys", "not signed by that site"),
    "a site that is not pinned": (_stranger, "secure_aggregation.peers", "pins no key of site e"),
    "two keys for one round": (_two_keys, "homomorphic_encryption.once", "already"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_with_the_rule_that_it_breaks(tmp_path: Path, name: str) -> None:
    attack, rule, reason = ATTACKS[name]
    with pytest.raises(SecureAggregationError, match=reason) as refused:
        attack(Round(tmp_path))
    assert refused.value.rule == rule


def train_at(site: Site, here: Round) -> tuple[pb.Update, pb.Train]:
    """A round of the real trainer `a` under the key of its peer b; what it sent and was asked."""
    site.peers = {name: KEYS[name].public_key() for name in "bcd"}
    trusts = HomomorphicEncryption(key_sites=("b",))
    site.policy = site.policy.model_copy(update={"homomorphic_encryption": trusts})
    message = describe(here.config)
    message.next_round = 1
    description = ask(site.service(), pb.DESCRIBE, message, 1)
    assert isinstance(description, pb.Description), description
    here.describe("bcd")
    here.round_keys["a"] = description.round_key
    train, _ = instruct(here.config, description)
    train.round_keys.extend(here.round_keys.values())
    train.encryption_key.CopyFrom(here.wrap())
    update = parse(*exchange(site.service(), pb.TRAIN, train, 2))
    assert isinstance(update, pb.Update), update
    assert not update.HasField("delta")
    assert (update.examples, update.tokens, dict(update.metrics)) == (0, 0, {})
    return update, train


def open_sum(here: Round, update: pb.Update, train: pb.Train) -> Total:
    """What b decrypts of a's update and those of c and d, of weight one and deltas of zero."""
    total = ckks.CiphertextSum(len(update.encrypted.ciphertexts))
    total.add("a", update.encrypted.ciphertexts)
    checksums = {"a": update.encrypted.checksum}
    zeros = {
        name: np.zeros_like(value)
        for name, value in decode(train.adapter).items()
        if "lora_B" in name
    }
    for name in "cd":
        peer = here.site(name)
        group = peer.join(here.header, list(here.round_keys.values()))
        counts, key = Counts(examples=1), train.encryption_key
        own = peer.encrypt(here.header, here.config, group, key, zeros, counts)
        total.add(name, own.encrypted.ciphertexts)
        checksums[name] = own.encrypted.checksum
    body = pb.Decrypt(alive=list("acd"), ciphertexts=total.ciphertexts(), checksums=checksums)
    values = here.site("b").decrypt(here.header, here.config, body).values
    return unpack(from_bytes(values), AdapterSpec.of(zeros), Scale.of(here.config, 4), 3)


def test_a_trainer_encrypts_what_a_plain_one_sends_and_its_audit_log_says_for_whom(
    site: Site, tmp_path: Path
) -> None:
    here = Round(tmp_path / "peers")
    update, train = train_at(site, here)
    assert update.round_key.site == "a"
    line = site.audit()[-1]
    assert (line["event"], line["encrypted_with"], line["key_site"]) == ("trained", "a,b,c,d", "b")
    opened = open_sum(here, update, train)

    plain = test_worker.run_config(
        aggregation={"method": "ffa"}, codec={"update": "float32"}, federation={"rounds": 2}
    )
    train.config = plain.model_dump_json()
    sent = ask(site.service(), pb.TRAIN, train, 3)
    weight = sent.examples + 2
    for name, value in decode(sent.delta).items():
        np.testing.assert_allclose(opened.mean[name], value * (sent.examples / weight), atol=1e-5)
    assert opened.examples == sent.examples + 2


def test_a_private_round_is_encrypted_too_and_its_receipt_is_over_the_ciphertexts(
    site: Site, tmp_path: Path
) -> None:
    test_private.begin(site)
    config = test_private.private_config(
        aggregation={"method": "ffa", "weighting": "uniform"},
        federation={"min_sites": 3, "rounds": 2},
        homomorphic_encryption={"enabled": True, "key_site": "b"},
    )
    here = Round(tmp_path / "peers", config=config)
    update, train = train_at(site, here)
    receipt = open_receipt(update.receipt, {"a": SITE.public_key()})
    sent = b"".join(update.encrypted.ciphertexts)
    assert receipt.update_digest == hashlib.sha256(sent).hexdigest()
    opened = open_sum(here, update, train)
    assert all(value.any() for value in opened.mean.values())
    assert opened.examples == 2, "the peers' own; of a private site no count is in the sum"


def test_a_trainer_that_holds_the_key_logs_what_it_wrapped_and_decrypted(
    site: Site, tmp_path: Path
) -> None:
    site.peers = {name: KEYS[name].public_key() for name in "bcd"}
    config = encrypted_config("a")
    here = Round(tmp_path / "peers", config=config)
    message = describe(config)
    message.next_round = 1
    description = ask(site.service(), pb.DESCRIBE, message, 1)
    here.describe("bcd")
    here.round_keys["a"] = description.round_key
    body = pb.Wrap(config=config.model_dump_json(), round_keys=here.round_keys.values())
    wrapped = ask(site.service(), pb.WRAP, body, 2)
    assert isinstance(wrapped, pb.WrappedKey), wrapped
    assert (site.audit()[-1]["event"], site.audit()[-1]["sites"]) == ("wrapped", "a,b,c,d")
    here.updates = {name: here.encrypt(name, wrapped) for name in "bcd"}
    decrypt = pb.Decrypt(
        config=config.model_dump_json(),
        alive=list("bcd"),
        ciphertexts=here.sum_of("bcd"),
        checksums={name: one.encrypted.checksum for name, one in here.updates.items()},
    )
    decryption = ask(site.service(), pb.DECRYPT, decrypt, 3)
    assert isinstance(decryption, pb.Decryption), decryption
    assert decryption.round_key.site == "a"
    assert (site.audit()[-1]["event"], site.audit()[-1]["sites"]) == ("decrypted", "b,c,d")
    refusal = ask(site.service(), pb.DECRYPT, decrypt, 4)
    assert (refusal.code, refusal.rule) == ("EncryptionError", "homomorphic_encryption.round")
    assert site.audit()[-1]["event"] == "refused"


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        ({}, "homomorphic_encryption.key_sites"),
        (
            {"homomorphic_encryption": HomomorphicEncryption(key_sites=("c",))},
            "homomorphic_encryption.key_sites",
        ),
        (
            {
                "homomorphic_encryption": HomomorphicEncryption(key_sites=("b",)),
                "secure_aggregation": SecureAggregation(sites=5),
            },
            "secure_aggregation.sites",
        ),
        ({"secure_aggregation": SecureAggregation(required=True)}, "secure_aggregation.required"),
    ],
)
def test_a_policy_that_does_not_name_the_key_site_refuses_before_any_record_is_read(
    site: Site, policy: dict[str, Any], rule: str
) -> None:
    site.peers = {name: KEYS[name].public_key() for name in "bcd"}
    site.policy = site.policy.model_copy(update=policy)
    _opened.clear()
    refusal = ask(site.service(), pb.DESCRIBE, describe(encrypted_config()), 1)
    assert (refusal.code, refusal.rule) == ("PolicyRefusal", rule)
    assert str(site.folder / "records.jsonl") not in _opened


def test_a_trainer_without_tenseal_says_so_and_reads_no_record(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)
    _opened.clear()
    refusal = ask(site.service(), pb.DESCRIBE, describe(encrypted_config()), 1)
    assert refusal.code == "ConfigError"
    assert "extra `he`" in refusal.sentence
    assert str(site.folder / "records.jsonl") not in _opened
