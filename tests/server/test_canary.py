"""The canary: a worse round is set back, its site named, and nothing is lost over a resume."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter
from fedqlora.codec import decode
from fedqlora.config import RunConfig
from fedqlora.engine.service import Identity, Service, listen
from fedqlora.errors import FederationError
from server.checkpoint import Checkpoint, RunFolder
from server.evaluation import NAME, Evaluator
from server.exchange import Exchange
from server.history import read_history
from server.metrics import Metrics
from server.report import render_report
from server.rounds import federate
from tests.server.conftest import COORDINATOR, House, LearningSite, run_config
from tests.server.test_rounds import events, outcomes

B = "m.lora_B.weight"
KEY = Ed25519PrivateKey.from_private_bytes(b"e" * 32)


class Scorer:
    """The held-out loss is how far B is from 1."""

    def __init__(self) -> None:
        self.scored: list[int] = []
        self.broken = False

    def perform(
        self,
        header: pb.Header,
        config: RunConfig,  # noqa: ARG002
        body: pb.Describe | pb.Train | pb.Evaluate,
    ) -> pb.Evaluation:
        assert isinstance(body, pb.Evaluate)
        self.scored.append(header.round)
        loss = float(np.abs(decode(body.adapter)[B] - 1).mean())
        if self.broken:
            loss = math.nan
        return pb.Evaluation(subsets={"all": pb.Scores(values={"loss": loss})})

    def refused(self, header: pb.Header, refusal: pb.Refusal) -> None:
        pass


@contextmanager
def evaluating(house: House) -> Iterator[tuple[Callable[[Exchange], Evaluator], Scorer]]:
    """A real evaluator service on a real socket."""
    scorer = Scorer()
    identity = Identity(name=NAME, key=KEY, coordinator=COORDINATOR.public_key())
    socket = house.tmp_path / "e.sock"
    server = listen(Service(identity, house.tmp_path / "window", scorer), socket)
    try:
        yield lambda exchange: Evaluator(socket, KEY.public_key(), exchange.sign), scorer
    finally:
        server.stop(grace=0).wait()


def finish(house: House, make: Callable[[Exchange], Evaluator]) -> Checkpoint:
    exchange = house.exchange()
    return federate(house.folder, exchange, len(house.sites), make(exchange))


def spoiled_in(rounds: tuple[int, ...], site: LearningSite) -> LearningSite:
    """A site whose update points far back in some rounds."""

    def spoil(delta: Adapter) -> Adapter:
        factor = -5 if site.trained[-1] in rounds else 1
        return {name: factor * value for name, value in delta.items()}

    site.spoil = spoil
    return site


def start(house: House, *, rounds: int, method: str = "fedavg", **aggregation: object) -> None:
    sections = {"aggregation": {"canary": 0.05, **aggregation}, "evaluation": {"enabled": True}}
    config = run_config(method, rounds=rounds, sections=sections)
    house.folder = RunFolder.create(house.tmp_path / "runs", config)
    for name in "abc":
        house.admit(name, LearningSite(target=1.0))


@pytest.mark.parametrize("method", ["fedavg", "ffa"])
def test_a_worse_round_is_set_back_and_the_site_named(house: House, method: str) -> None:
    start(house, rounds=3, method=method)
    house.admit("bad", spoiled_in((2,), LearningSite(target=1.0)))
    with evaluating(house) as (make, scorer):
        final = finish(house, make)
    (rollback,) = events(house, "rollback")
    assert (rollback["round"], rollback["site"]) == (2, "bad")
    assert rollback["loss"] > rollback["limit"]
    assert rollback["without"]["bad"] < rollback["limit"]
    first, second = (house.folder.path / "rounds" / f"000{n}" for n in (1, 2))
    for name in ("adapter", "residual"):
        file = f"{name}.safetensors"
        assert (first / file).read_bytes() == (second / file).read_bytes()
    # Start and three rounds, and each of four sites left out once.
    assert scorer.scored.count(2) == 1 + 4
    assert len(scorer.scored) == 4 + 4
    losses = [line["scores"]["all"]["loss"] for line in events(house, "evaluation")]
    assert losses[2] == losses[1]
    assert losses[3] < losses[1]
    assert final.round == 3
    # Its updates of other rounds count: it was not excluded.
    assert outcomes(house, 3)["bad"] == "used"


def test_without_the_canary_the_worse_round_is_what_the_run_goes_on_with(house: House) -> None:
    sections = {"evaluation": {"enabled": True}}
    house.folder = RunFolder.create(
        house.tmp_path / "runs", run_config(rounds=2, sections=sections)
    )
    for name in "abc":
        house.admit(name, LearningSite(target=1.0))
    house.admit("bad", spoiled_in((2,), LearningSite(target=1.0)))
    with evaluating(house) as (make, _):
        finish(house, make)
    losses = [line["scores"]["all"]["loss"] for line in events(house, "evaluation")]
    assert losses[2] > 1.05 * losses[1]


def test_trials_are_bounded_and_take_the_longest_updates_first(house: House) -> None:
    start(house, rounds=2, canary_trials=1)
    house.admit("bad", spoiled_in((2,), LearningSite(target=1.0)))
    with evaluating(house) as (make, scorer):
        finish(house, make)
    (rollback,) = events(house, "rollback")
    assert list(rollback["without"]) == ["bad"]
    assert rollback["site"] == "bad"
    assert scorer.scored.count(2) == 2


def test_nobody_is_named_where_no_single_site_made_it_worse(house: House) -> None:
    start(house, rounds=2)
    for site in house.sites.values():
        spoiled_in((2,), site)
    with evaluating(house) as (make, _):
        finish(house, make)
    (rollback,) = events(house, "rollback")
    assert rollback["site"] == ""
    assert "nobody stands out" in render_report(read_history(house.folder))


def test_a_site_named_often_enough_is_excluded_and_the_report_says_why(house: House) -> None:
    start(house, rounds=5, exclude_after=2)
    house.admit("bad", spoiled_in((2, 3, 4, 5), LearningSite(target=1.0)))
    with evaluating(house) as (make, _):
        finish(house, make)
    assert [line["round"] for line in events(house, "rollback")] == [2, 3]
    assert set(outcomes(house, 4)) == {"a", "b", "c"}
    history = read_history(house.folder)
    assert set(history.absent[4]) == {"bad"}
    page = render_report(history)
    assert "excluded: 2 rounds were set back because of it" in page
    assert "Rounds that were set back" in page
    assert house.sites["bad"].trained == [1, 2, 3]


def test_a_run_whose_excluded_sites_leave_too_few_ends_and_says_so(house: House) -> None:
    sections = {
        "aggregation": {"canary": 0.05, "exclude_after": 1},
        "evaluation": {"enabled": True},
    }
    house.folder = RunFolder.create(
        house.tmp_path / "runs", run_config(rounds=3, sections=sections)
    )
    house.admit("a", LearningSite(target=1.0))
    house.admit("bad", spoiled_in((1, 2, 3), LearningSite(target=1.0)))
    with (
        evaluating(house) as (make, _),
        pytest.raises(FederationError, match="bad excluded: 1 rounds were set back"),
    ):
        finish(house, make)


def test_a_resumed_run_sets_back_counts_and_excludes_as_an_unbroken_one(house: House) -> None:
    start(house, rounds=5, exclude_after=2)
    house.admit("bad", spoiled_in((2, 3, 4, 5), LearningSite(target=1.0)))

    def facts() -> list[dict[str, Any]]:
        lines = Metrics(house.folder.path / "metrics.jsonl").read()
        kept = [line for line in lines if line["event"] in ("rollback", "evaluation")]
        return [{k: v for k, v in line.items() if k not in ("time", "seconds")} for line in kept]

    with evaluating(house) as (make, _):
        unbroken = finish(house, make)
        before = facts()
        # As if the ServerApp had been killed in round 3, after the loss was known.
        for round_ in (3, 4, 5):
            shutil.rmtree(house.folder.path / "rounds" / f"{round_:04d}")
        resumed = finish(house, make)
    assert facts() == before
    assert save(resumed.adapter) == save(unbroken.adapter)
    assert house.sites["bad"].trained == [1, 2, 3, 3]


def test_a_held_out_set_without_a_loss_ends_the_run_and_says_so(house: House) -> None:
    start(house, rounds=1)
    with evaluating(house) as (make, scorer):
        scorer.broken = True
        with pytest.raises(FederationError, match="correct the held-out set"):
            finish(house, make)
