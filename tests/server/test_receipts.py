"""Receipts at the coordinator: an update whose receipt is wrong does not count, and is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Error

import server.receipts
from fedqlora import protocol_pb2 as pb
from fedqlora.config import RunConfig
from fedqlora.envelope import claimed_header
from fedqlora.errors import ConfigError
from fedqlora.privacy.accountant import Spending, spent_epsilon
from fedqlora.privacy.receipts import Receipt, check_receipts, sign_receipt
from fedqlora.update import read_content
from server.checkpoint import RunFolder
from server.rounds import federate
from tests.server.conftest import House, LearningSite, run_config, site_key
from tests.server.test_rounds import B, events, outcomes

NOISE = 1.0
PRIVACY = {"unit": "patient", "epsilon": 8.0, "delta": 0.01}


@dataclass
class PrivateSite(LearningSite):
    """A site whose receipts are true but for what `lie` and `claim` say.

    A lie is of the figures and worked into the epsilons, so that the receipt fits in itself.
    """

    name: str = "a"
    lie: Mapping[str, object] = field(default_factory=dict)
    claim: Mapping[str, object] = field(default_factory=dict)
    signs: Ed25519PrivateKey | None = None
    leaves_out: bool = False
    app: list[str] = field(default_factory=list)
    steps: int = 0

    def perform(
        self, header: pb.Header, config: RunConfig, body: pb.Describe | pb.Train | pb.Evaluate
    ) -> pb.Description | pb.Update:
        answer = super().perform(header, config, body)
        self.app.append(body.app_digest)  # type: ignore[union-attr]
        answer.ledger_head = f"{self.name}{header.round}"
        if isinstance(answer, pb.Update) and not self.leaves_out:
            self.steps += config.training.steps
            receipt = self._account(header, config, body.app_digest, answer)  # type: ignore[union-attr]
            answer.receipt = sign_receipt(receipt, self.signs or site_key(self.name))
        return answer

    def _account(
        self, header: pb.Header, config: RunConfig, app: str, update: pb.Update
    ) -> Receipt:
        figures = {
            "sampling_rate": 0.5,
            "noise_multiplier": NOISE,
            "steps": config.training.steps,
            "run_steps": self.steps,
            "delta": config.privacy.delta,
            **self.lie,
        }

        def spent(steps: object) -> float:
            one = {**figures, "steps": steps}
            names = ("sampling_rate", "noise_multiplier", "steps")
            return spent_epsilon([Spending(**{n: one[n] for n in names})], one["delta"])  # type: ignore[arg-type]

        everything = (figures["sampling_rate"], figures["noise_multiplier"], figures["run_steps"])
        values = {
            "site": self.name,
            "run": header.run,
            "round": header.round,
            "cohort": "all",
            "unit": config.privacy.unit,
            "clip_norm": config.privacy.clip_norm,
            **figures,
            "epsilon_round": spent(figures["steps"]),
            "epsilon_run": spent(figures["run_steps"]),
            "cohort_delta": figures["delta"],
            "epsilon_cohort": spent(figures["run_steps"]),
            "cohort_spent": (everything,),
            "base_digest": self.base_digest,
            "app_digest": app,
            "instruction_digest": hashlib.sha256(header.SerializeToString()).hexdigest(),
            "update_digest": hashlib.sha256(read_content(update)).hexdigest(),
            "ledger_head": update.ledger_head,
        }
        return Receipt.model_validate({**values, **self.claim})


@pytest.fixture
def private(tmp_path: Path) -> House:
    """A private run of two rounds, no site yet."""
    return House(tmp_path, RunFolder.create(tmp_path / "runs", private_config()))


def private_config(**federation: object) -> RunConfig:
    return run_config(
        sections={
            "privacy": PRIVACY,
            "training": {"packing": False},
            "data": {"validation_fraction": 0},
            "aggregation": {"weighting": "uniform"},
        },
        **federation,
    )


def receipts(house: House) -> list[Receipt]:
    keys = {name: site_key(name).public_key() for name in house.sites}
    return check_receipts(house.folder.path / "receipts.jsonl", keys)


def test_receipts_that_hold_are_kept_with_the_ledgers_heads(private: House) -> None:
    for name in "ab":
        private.admit(name, PrivateSite(target=4.0, name=name))
    federate(private.folder, private.exchange(), 2, None)
    assert [(one.site, one.round) for one in receipts(private)] == [
        ("a", 1), ("b", 1), ("a", 2), ("b", 2),
    ]  # fmt: skip
    heads = json.loads((private.folder.path.parent / "ledger-heads.json").read_text())
    assert heads == {"a": "a2", "b": "b2"}


LIES: dict[str, dict[str, object]] = {
    "run": {"claim": {"run": "another"}},
    "round": {"claim": {"round": 7}},
    "unit": {"claim": {"unit": "example"}},
    "clip_norm": {"claim": {"clip_norm": 100.0}},
    "base_digest": {"claim": {"base_digest": "e" * 64}},
    "app_digest": {"claim": {"app_digest": "f" * 64}},
    "instruction_digest": {"claim": {"instruction_digest": "0" * 64}},
    "update_digest": {"claim": {"update_digest": "0" * 64}},
    "ledger_head": {"claim": {"ledger_head": "an older one"}},
    "epsilon_round": {"claim": {"epsilon_round": 0.1}},
    "epsilon_cohort": {"claim": {"epsilon_cohort": 0.1}},
    "steps": {"lie": {"steps": 2, "run_steps": 2}},
    "delta": {"lie": {"delta": 0.5}},
    "epsilon_run": {"lie": {"noise_multiplier": 0.3}},
    "no key of that site": {"claim": {"site": "b"}},
    "not what the site signed": {"signs": site_key("mallory")},
    "does not parse": {"leaves_out": True},
}


@pytest.mark.parametrize("name", LIES)
def test_an_update_whose_receipt_is_wrong_does_not_count_and_is_named(
    private: House, name: str
) -> None:
    for other in "ab":
        private.admit(other, PrivateSite(target=4.0, name=other))
    # The same update without the lie is the mean's third part: it is the receipt that is refused.
    private.admit("c", PrivateSite(target=10.0, name="c", **LIES[name]))  # type: ignore[arg-type]
    last = federate(private.folder, private.exchange(), 3, None)
    np.testing.assert_allclose(last.adapter[B], np.full((3, 2), 3.0))
    assert outcomes(private, 1) == {"a": "used", "b": "used", "c": "invalid"}
    reasons = {line["reason"] for line in events(private, "site") if line["site"] == "c"}
    assert all(name in reason for reason in reasons), reasons
    assert {one.site for one in receipts(private)} == {"a", "b"}
    heads = json.loads((private.folder.path.parent / "ledger-heads.json").read_text())
    assert heads["c"] == "c0", "as it described itself"


def test_a_true_receipt_of_the_third_site_counts(private: House) -> None:
    for other in "ab":
        private.admit(other, PrivateSite(target=4.0, name=other))
    private.admit("c", PrivateSite(target=10.0, name="c"))
    last = federate(private.folder, private.exchange(), 3, None)
    np.testing.assert_allclose(last.adapter[B], np.full((3, 2), 4.5))


def test_a_late_updates_receipt_is_of_the_round_before(tmp_path: Path) -> None:
    config = private_config(late_updates="use", rounds=3, round_deadline_seconds=0.5)
    house = House(tmp_path, RunFolder.create(tmp_path / "runs", config))
    for name in "abc":
        house.admit(name, PrivateSite(target=4.0, name=name))
    first = house.grid.nodes[1]

    def watch(sent: bytes) -> bytes | Error | None:
        # Site c's answer to round 1 comes while round 2 goes on.
        round_ = claimed_header(sent).round
        house.grid.slow = {3} if round_ == 1 else set()
        if round_ == 2:
            house.grid.release()
        return first(sent)

    house.grid.nodes[1] = watch
    federate(house.folder, house.exchange(), 3, None)
    assert [outcomes(house, round_)["c"] for round_ in (1, 2, 3)] == ["late", "used", "used"]
    assert [one.round for one in receipts(house) if one.site == "c"] == [1, 3]


def test_every_instruction_says_which_app_runs(private: House) -> None:
    site = PrivateSite(target=4.0, name="a")
    private.admit("a", site)
    private.admit("b", PrivateSite(target=4.0, name="b"))
    exchange = private.exchange()
    exchange.app = "5" * 64
    federate(private.folder, exchange, 2, None)
    assert site.app == ["5" * 64] * 3
    assert {one.app_digest for one in receipts(private)} == {"5" * 64}


def test_a_coordinator_without_the_accounting_refuses_a_private_run_before_it_starts(
    private: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.receipts.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="install fedqlora with the extra `engine`"):
        federate(private.folder, private.exchange(), 2, None)
    assert private.folder.latest() is None
