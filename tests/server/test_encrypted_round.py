"""Rounds under homomorphic encryption: the centre's side, with real sites and real keys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedqlora import protocol_pb2 as pb
from fedqlora.config import RunConfig, validate
from fedqlora.errors import FederationError
from server.metrics import Metrics
from tests.server.conftest import House, run_config
from tests.server.summing import (
    EXAMPLES,
    TARGETS,
    B,
    SummingSite,
    finish,
    lose,
    outcomes,
    secure_config,
    service_of,
)
from tests.server.summing import make_house as make_house_of

FOUR = "abcd"


def make_house(tmp_path: Path, config: RunConfig) -> House:
    return make_house_of(tmp_path, config, FOUR)


def encrypted_config(weighting: str = "examples", rounds: int = 2, **he: object) -> RunConfig:
    values = run_config("ffa", min_sites=3, rounds=rounds).model_dump(mode="json")
    section = {"enabled": True, "key_site": "b", "largest_value": 4.0, **he}
    values["aggregation"]["weighting"] = weighting
    return validate(RunConfig, {**values, "homomorphic_encryption": section}, "run.toml")


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_an_encrypted_run_ends_as_a_plain_one_does(tmp_path: Path, weighting: str) -> None:
    encrypted = finish(make_house(tmp_path / "he", encrypted_config(weighting)))
    off = encrypted_config(weighting, enabled=False)
    plain = finish(make_house(tmp_path / "plain", off))
    np.testing.assert_allclose(encrypted[B], plain[B], atol=1e-5)
    # In fact to the steps of the fixed point, as under secure aggregation.
    np.testing.assert_allclose(encrypted[B], plain[B], atol=2e-8 * 4)
    weights = EXAMPLES if weighting == "examples" else dict.fromkeys(FOUR, 1)
    mean = sum(TARGETS[n] * weights[n] for n in FOUR) / sum(weights[n] for n in FOUR)
    np.testing.assert_allclose(plain[B], np.full((3, 2), 0.75 * mean), atol=1e-6)


def test_it_goes_with_neither_figures_of_one_site_nor_a_key_at_the_centre(tmp_path: Path) -> None:
    house = make_house(tmp_path, encrypted_config(rounds=1))
    sent: list[bytes] = []
    for node, answer in list(house.grid.nodes.items()):
        house.grid.nodes[node] = _note(answer, sent)
    finish(house)
    lines = Metrics(house.folder.path / "metrics.jsonl").read()
    sites = [line for line in lines if line["event"] == "site"]
    assert len(sites) == 4
    assert not any({"examples", "tokens", "train_loss", "update_norm"} & set(s) for s in sites)
    (round_,) = [line for line in lines if line["event"] == "round"]
    assert (round_["examples"], round_["tokens"]) == (sum(EXAMPLES[n] for n in FOUR), 400)
    assert round_["opening_bytes_up"] > 0
    # The key site's disk has no key any longer, and what encrypts did not travel in the clear.
    (kept,) = (tmp_path / "state" / "b" / "encryption").iterdir()
    assert b'"secret": ""' in kept.read_bytes()
    assert sent
    assert not any(b"encrypt" in one for one in sent)


def _note(answer, sent):  # type: ignore[no-untyped-def]
    def noted(data: bytes) -> bytes:
        sent.append(answer(data))
        return sent[-1]

    return noted


def test_a_site_that_is_lost_is_not_in_the_sum_and_is_back_in_the_next_round(
    tmp_path: Path,
) -> None:
    house = make_house(tmp_path, encrypted_config(rounds=2))
    lose(house, "d", pb.TRAIN)
    finish(house)
    assert outcomes(house, 1) == {**dict.fromkeys(FOUR, "used"), "d": "lost"}
    assert outcomes(house, 2) == dict.fromkeys(FOUR, "used")


@pytest.mark.parametrize("kind", [pb.WRAP, pb.DECRYPT])
def test_without_the_key_site_the_run_ends_with_its_name_and_can_be_resumed(
    tmp_path: Path, kind: int
) -> None:
    unbroken = finish(make_house(tmp_path / "unbroken", encrypted_config()))
    house = make_house(tmp_path, encrypted_config())
    lose(house, "b", kind, round_=2)
    with pytest.raises(FederationError, match=r"round 2 needs site b, the key site, to"):
        finish(house)
    house.grid.nodes = {n: service_of(house, n) for n in house.grid.nodes}
    np.testing.assert_allclose(finish(house)[B], unbroken[B], atol=1e-6)


def test_a_key_site_that_is_not_there_is_named(tmp_path: Path) -> None:
    house = make_house(tmp_path, encrypted_config(key_site="zebra"))
    with pytest.raises(FederationError, match=r"site zebra, the key site.*not connected"):
        finish(house)


def test_an_encrypted_update_of_another_size_is_left_out_and_named(tmp_path: Path) -> None:
    house = make_house(tmp_path, encrypted_config(rounds=1))
    site = house.sites["c"]
    assert isinstance(site, SummingSite)
    site.wrong = True
    finish(house)
    assert outcomes(house, 1) == {**dict.fromkeys(FOUR, "used"), "c": "invalid"}


def test_masked_and_encrypted_sums_agree_to_a_step(tmp_path: Path) -> None:
    masked = finish(make_house(tmp_path / "m", secure_config("ffa")))
    encrypted = finish(make_house(tmp_path / "e", encrypted_config()))
    np.testing.assert_allclose(masked[B], encrypted[B], atol=1e-7)
