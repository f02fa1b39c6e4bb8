"""Rounds under secure aggregation: the centre's side, with real sites' masks and a lost few."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Error

from fedqlora import protocol_pb2 as pb
from fedqlora.envelope import claimed_header
from fedqlora.errors import FederationError
from server.metrics import Metrics
from server.traffic import describe_traffic
from tests.server.summing import (
    EXAMPLES,
    FIVE,
    TARGETS,
    A,
    B,
    SummingSite,
    finish,
    lose,
    make_house,
    outcomes,
    secure_config,
    service_of,
)


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
    assert isinstance(site, SummingSite)
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
    assert isinstance(site, SummingSite)
    site.wrong = True
    finish(house)
    assert outcomes(house, 1) == {**dict.fromkeys(FIVE, "used"), "c": "invalid"}


def test_a_site_without_a_key_of_its_own_cannot_take_part(tmp_path: Path) -> None:
    """A key that honest sites would refuse is found before they are asked."""
    house = make_house(tmp_path, secure_config(rounds=1))
    site = house.sites["c"]
    assert isinstance(site, SummingSite)
    site.signer = Ed25519PrivateKey.generate()
    finish(house)
    assert "c" not in outcomes(house, 1)
    lines = Metrics(house.folder.path / "metrics.jsonl").read()
    (line,) = [line for line in lines if line["event"] == "unusable"]
    assert "not signed by that site" in line["reason"]
