"""Partial participation: samples, weights without those who are missing, and late replies."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Error

from fedqlora.envelope import claimed_header
from server.checkpoint import Checkpoint, RunFolder
from server.history import read_history
from server.report import render_report
from server.rounds import federate
from server.sampling import sample_sites
from tests.server.conftest import House, LearningSite, run_config
from tests.server.test_rounds import B, events, outcomes

NAMES = "abcdefgh"


def finish(house: House) -> Checkpoint:
    return federate(house.folder, house.exchange(), len(house.sites), None)


def test_a_sample_is_decided_by_seed_and_round_and_takes_turns() -> None:
    config = run_config(sample_sites=3)
    samples = [frozenset(sample_sites(config, round_, NAMES)) for round_ in range(1, 41)]
    assert {len(sample) for sample in samples} == {3}
    assert samples == [frozenset(sample_sites(config, r, reversed(NAMES))) for r in range(1, 41)]
    assert len(set(samples)) > 20
    counts = Counter(site for sample in samples for site in sample)
    assert min(counts.values()) > 5
    other = config.model_copy(update={"seed": 2})
    assert samples != [frozenset(sample_sites(other, r, NAMES)) for r in range(1, 41)]


def test_a_share_is_rounded_up_and_never_below_min_sites() -> None:
    config = run_config(sample_fraction=0.4, min_sites=2)
    assert [len(sample_sites(config, 1, NAMES[:n])) for n in (1, 2, 3, 5, 6, 8)] == [
        1,
        2,
        2,
        2,
        3,
        4,
    ]
    assert sample_sites(run_config(), 1, NAMES) == set(NAMES)


def test_a_site_that_is_away_changes_nobody_elses_place() -> None:
    config = run_config(sample_sites=3)
    whole = sample_sites(config, 1, NAMES)
    away = sorted(whole)[0]
    assert whole - {away} < sample_sites(config, 1, set(NAMES) - {away})


def test_a_round_asks_its_sample_and_says_who_rested(house: House) -> None:
    config = run_config(rounds=4, sample_sites=2)
    house.folder = RunFolder.create(house.tmp_path / "runs", config)
    for name in NAMES[:4]:
        house.admit(name, LearningSite(target=1.0))
    finish(house)
    for round_ in range(1, 5):
        asked = sample_sites(config, round_, NAMES[:4])
        assert set(outcomes(house, round_)) == asked
    trained = {name: site.trained for name, site in house.sites.items()}
    assert sum(len(rounds) for rounds in trained.values()) == 4 * 2
    history = read_history(house.folder)
    assert set(history.absent[1]) == set(NAMES[:4]) - sample_sites(config, 1, NAMES[:4])
    assert "not in this round&#x27;s sample" in render_report(history)


def test_a_resumed_run_asks_the_same_sample(house: House) -> None:
    house.folder = RunFolder.create(
        house.tmp_path / "runs", run_config(rounds=4, sample_fraction=0.5)
    )
    for name in NAMES[:4]:
        house.admit(name, LearningSite(target=ord(name) / 100))
    unbroken = finish(house)
    before = [outcomes(house, round_) for round_ in (3, 4)]
    for round_ in (3, 4):
        shutil.rmtree(house.folder.path / "rounds" / f"{round_:04d}")
    resumed = finish(house)
    assert [outcomes(house, round_) for round_ in (3, 4)] == before
    assert resumed.adapter[B].tobytes() == unbroken.adapter[B].tobytes()


def test_weights_are_those_of_the_sites_that_came(house: House) -> None:
    house.folder = RunFolder.create(house.tmp_path / "runs", run_config(rounds=1))
    house.admit("a", LearningSite(target=1.0, examples=4))
    house.admit("b", LearningSite(target=5.0, examples=12))
    service = house.admit("lost", LearningSite(target=99.0, examples=16))

    def dies_in_training(sent: bytes) -> bytes | Error:
        return Error(1, "gone") if claimed_header(sent).round else service.exchange(sent)

    house.grid.nodes[3] = dies_in_training
    # (4*1 + 12*5) / 16 = 4, half the way: the third site's weight is in no sum.
    np.testing.assert_allclose(finish(house).adapter[B], 2.0)


def slow_start(house: House, late: str, rounds: int = 3) -> None:
    """Sites a, b and a third whose reply to round 1 arrives in round 2."""
    config = run_config(rounds=rounds, late_updates=late, round_deadline_seconds=0.3)
    house.folder = RunFolder.create(house.tmp_path / "runs", config)
    house.admit("a", LearningSite(target=1.0))
    house.admit("b", LearningSite(target=1.0))
    house.admit("slow", LearningSite(target=2.0))
    first = house.grid.nodes[1]

    def watch(sent: bytes) -> bytes | Error | None:
        round_ = claimed_header(sent).round
        # Slow in round 1 only, and what it answered then comes while round 2 goes on.
        house.grid.slow = {3} if round_ == 1 else set()
        if round_ == 2:
            house.grid.release()
        return first(sent)

    house.grid.nodes[1] = watch


def test_a_late_update_counts_once_in_the_next_round(house: House) -> None:
    slow_start(house, "use")
    finish(house)
    assert outcomes(house, 1)["slow"] == "late"
    assert outcomes(house, 2) == {"a": "used", "b": "used", "slow": "used"}
    assert outcomes(house, 3)["slow"] == "used"
    # It was not asked in round 2: its answer then is the one to round 1.
    assert house.sites["slow"].trained == [1, 3]
    lines = {line["round"]: line for line in events(house, "site") if line["site"] == "slow"}
    assert lines[2]["stale"] == 1
    assert lines[2]["bytes_down"] == 0
    assert lines[2]["bytes_up"] > 0
    assert "stale" not in lines[3]


def test_a_late_update_moves_the_adapter_by_what_it_was_when_it_was_made(house: House) -> None:
    slow_start(house, "use", rounds=2)
    # Round 1: a and b go to 0.5. Round 2: each by 0.25, and by 1 from the slow one's start at 0.
    np.testing.assert_allclose(finish(house).adapter[B], 0.5 + (0.25 + 0.25 + 1) / 3, rtol=1e-6)


def test_a_late_update_that_is_to_be_discarded_is(house: House) -> None:
    slow_start(house, "discard")
    finish(house)
    assert outcomes(house, 1)["slow"] == "late"
    assert house.sites["slow"].trained == [1, 2, 3]
    assert not any("stale" in line for line in events(house, "site"))


def test_an_update_that_is_late_twice_is_discarded_and_the_site_asked_again(house: House) -> None:
    config = run_config(rounds=3, late_updates="use", round_deadline_seconds=0.3)
    house.folder = RunFolder.create(house.tmp_path / "runs", config)
    house.admit("a", LearningSite(target=1.0))
    house.admit("b", LearningSite(target=1.0))
    service = house.admit("slow", LearningSite(target=2.0))

    def silent_once(sent: bytes) -> bytes | None:
        return None if claimed_header(sent).round == 1 else service.exchange(sent)

    house.grid.nodes[3] = silent_once
    finish(house)
    assert [outcomes(house, round_)["slow"] for round_ in (1, 2, 3)] == ["late", "late", "used"]
    assert house.sites["slow"].trained == [3]
    reasons = [line["reason"] for line in events(house, "site") if line["outcome"] == "late"]
    assert "of this round either; it is not waited for any longer" in reasons[1]


def test_a_node_that_joins_meanwhile_does_not_make_a_late_update_forgotten(house: House) -> None:
    slow_start(house, "use")
    joining = house.admit("new", LearningSite(target=1.0))
    del house.grid.nodes[4]
    second: Callable[[bytes], bytes | Error | None] = house.grid.nodes[2]

    def bring(sent: bytes) -> bytes | Error | None:
        if claimed_header(sent).round == 1:
            house.grid.nodes[4] = joining.exchange
        return second(sent)

    house.grid.nodes[2] = bring
    finish(house)
    assert outcomes(house, 2) == dict.fromkeys(("a", "b", "new", "slow"), "used")


@pytest.mark.parametrize("late", ["use", "discard"])
def test_nobody_late_makes_no_difference(house: House, late: str) -> None:
    house.folder = RunFolder.create(house.tmp_path / "runs", run_config(late_updates=late))
    house.admit("a", LearningSite(target=1.0))
    house.admit("b", LearningSite(target=5.0))
    np.testing.assert_allclose(finish(house).adapter[B], 2.25)
