"""Client-level privacy: what one site can change, how much noise lies over it, what is reported."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from fedqlora.adapter import Adapter, AdapterSpec, norm
from fedqlora.config import RunConfig, validate
from fedqlora.errors import PrivacyError, UpdateError
from fedqlora.privacy.noise import SecureNoise
from server.aggregation.fedavg import FedAvg
from server.aggregation.site_privacy import CLIP, SitePrivacy, noise_multiplier, split_noise
from server.checkpoint import RunFolder
from server.metrics import Metrics
from server.rounds import federate
from tests.server.conftest import House, LearningSite, run_config

NAME = "m.lora_B.weight"
SITES = 40


def private_config(sites: int = SITES, rounds: int = 5, **settings: object) -> RunConfig:
    asked = {"epsilon": 4.0, "delta": 1e-2, "few_sites": sites < 30, **settings}
    return run_config(
        "fedavg",
        sections={"site_privacy": asked, "aggregation": {"weighting": "uniform"}},
        rounds=rounds,
        expected_sites=sites,
    )


def start(
    config: RunConfig, size: int = 6, memory: Adapter | None = None, key: bytes | None = None
) -> SitePrivacy:
    before = {NAME: np.zeros((size, 1), dtype=np.float32)}
    spec, noise = AdapterSpec.of(before), SecureNoise(key)
    return SitePrivacy(FedAvg(before), spec, config, 1, memory or {}, noise)


def delta(*values: float) -> Adapter:
    return {NAME: np.array(values, dtype=np.float32).reshape(-1, 1)}


@pytest.mark.parametrize(
    "sent", [delta(*[1e4] * 6), delta(0, 0, 0.3, 0, 0, 0), delta(*[0.0] * 6), delta(*[-3e-5] * 6)]
)
def test_one_site_more_changes_the_sum_by_the_clip_norm_at_most_whatever_it_sends(
    sent: Adapter,
) -> None:
    config = private_config(clip_norm=0.5)
    ends = []
    for there in (False, True):
        round_ = start(config, key=b"n" * 32)
        round_.add("a", delta(1, 2, 3, 4, 5, 6), 1)
        if there:
            round_.add("b", sent, 1)
        ends.append(round_.finish().adapter[NAME])
    # Divided by the same number both times.
    change = norm({NAME: ends[1] - ends[0]}) * SITES
    assert change <= 0.5 * (1 + 1e-5)
    assert change == pytest.approx(min(0.5, norm(sent)), abs=1e-5)


def test_a_site_counts_once_and_by_itself() -> None:
    round_ = start(private_config())
    round_.add("a", delta(*[0.1] * 6), 1)
    with pytest.raises(UpdateError, match="a second update in one round"):
        round_.add("a", delta(*[0.1] * 6), 1)
    with pytest.raises(UpdateError, match="weight 3, and all count once"):
        round_.add("b", delta(*[0.1] * 6), 3)
    with pytest.raises(UpdateError, match="no update was folded in"):
        start(private_config()).finish()


def test_noise_has_the_length_that_was_worked_out_before_the_run() -> None:
    config = private_config(clip_norm=2.0)
    round_ = start(config, size=20_000)
    round_.add("a", {NAME: np.zeros((20_000, 1), dtype=np.float32)}, 1)
    result = round_.finish()
    expected = noise_multiplier(config) * 2.0 / SITES
    assert result.adapter[NAME].std() == pytest.approx(expected, rel=0.03)
    ratio = noise_multiplier(config) * math.sqrt(20_000) / SITES
    assert result.figures["site_noise_ratio"] == pytest.approx(ratio)
    assert CLIP not in result.memory


def separation(config: RunConfig, rounds: int, *, noised: bool) -> float:
    """How far apart a site's presence and absence lie along its own update, in deviations."""
    own = delta(1, 0, 0, 0, 0, 0)
    scores: dict[bool, list[float]] = {False: [], True: []}
    for there in (False, True):
        for _ in range(rounds):
            round_ = start(config)
            if not noised:
                round_._multiplier = 1e-9
            round_.add("a", delta(0, 1, 0, 0, 0, 0), 1)
            if there:
                round_.add("b", own, 1)
            scores[there].append(float(round_.finish().adapter[NAME][0, 0]))
    spread = max(float(np.std(scores[False])), 1e-12)
    return float(np.mean(scores[True]) - np.mean(scores[False])) / spread


def test_a_site_stands_out_without_noise_and_by_one_over_the_multiplier_with_it() -> None:
    config = private_config()
    assert separation(config, 20, noised=False) > 1000
    found = separation(config, 1500, noised=True)
    # 0.1 is 2.7 standard errors of the difference of two means.
    assert found == pytest.approx(1 / noise_multiplier(config), abs=0.1)


@pytest.mark.parametrize(("multiplier", "sites"), [(0.3, 1000), (4.0, 30), (20.0, 5)])
def test_updates_and_count_together_spend_what_one_gaussian_does(
    multiplier: float, sites: int
) -> None:
    updates, count = split_noise(multiplier, sites)
    # Sensitivity of the count is one half, and precisions add up.
    assert updates**-2 + (2 * count) ** -2 == pytest.approx(multiplier**-2)
    assert multiplier < updates < 1.04 * multiplier


def test_an_adaptive_clip_norm_goes_where_half_of_the_updates_are_shorter() -> None:
    sites = 300
    config = private_config(sites, rounds=40, epsilon=200.0, clip_quantile=0.5, clip_rate=0.5)
    memory: Adapter = {}
    for _ in range(40):
        round_ = start(config, memory=memory)
        for number in range(sites):
            round_.add(f"s{number}", delta(10 * number / sites, 0, 0, 0, 0, 0), 1)
        memory = dict(round_.finish().memory)
    assert float(memory[CLIP][0]) == pytest.approx(5, abs=1)


def test_the_share_of_short_updates_is_never_seen_without_noise() -> None:
    config = private_config(clip_quantile=0.5)
    moved = set()
    for _ in range(5):
        round_ = start(config)
        round_.add("a", delta(0, 0, 0, 0, 0, 0), 1)
        moved.add(float(round_.finish().memory[CLIP][0]))
    assert len(moved) == 5


def make_house(tmp_path: Path, config: RunConfig) -> House:
    house = House(tmp_path, RunFolder.create(tmp_path / "runs", config))
    for number, name in enumerate("abc"):
        house.admit(name, LearningSite(target=float(number)))
    return house


def test_a_run_reports_epsilon_after_each_round_and_keeps_its_promise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = private_config(3, rounds=3, epsilon=4.0, clip_quantile=0.5)
    house = make_house(tmp_path, config)
    checkpoint = federate(house.folder, house.exchange(), 3, None)
    lines = Metrics(house.folder.path / "metrics.jsonl").read()
    rounds = [line for line in lines if line["event"] == "round"]
    spent = [line["site_epsilon"] for line in rounds]
    assert spent == sorted(spent)
    assert 3.9 < spent[-1] <= 4.0
    assert rounds[0]["site_clip_norm"] == 1.0
    # The next round's bound survives a restart.
    assert rounds[-1]["site_clip_norm"] != 1.0
    assert CLIP in checkpoint.memory
    assert any("times as long as the longest mean of 3 sites" in one for one in caplog.messages)


def test_no_site_decides_by_its_norm_whether_another_is_taken(tmp_path: Path) -> None:
    """Without noise an update far above the others' norms is refused; here it is clipped."""
    for private in (False, True):
        config = private_config(3, rounds=2)
        values = config.model_dump(mode="json")
        if not private:
            values["site_privacy"] = {}
        house = make_house(tmp_path / str(private), validate(RunConfig, values, "t"))
        long = house.sites["c"]

        def spoil(own: Adapter, long: LearningSite = long) -> Adapter:
            size = 1.0 if long.trained == [1] else 25.0
            return {name: np.full_like(value, size) for name, value in own.items()}

        long.spoil = spoil
        federate(house.folder, house.exchange(), 3, None)
        lines = Metrics(house.folder.path / "metrics.jsonl").read()
        outcomes = {
            line["site"]: line["outcome"]
            for line in lines
            if line["event"] == "site" and line["round"] == 2
        }
        assert outcomes["c"] == ("used" if private else "invalid")


def test_a_promise_that_cannot_be_kept_ends_the_run_before_any_site_is_asked(
    tmp_path: Path,
) -> None:
    house = make_house(tmp_path, private_config(3, epsilon=1e-6, delta=1e-9))
    with pytest.raises(PrivacyError, match="cannot be met"):
        federate(house.folder, house.exchange(), 3, None)
    assert not any(site.trained for site in house.sites.values())
    assert not Metrics(house.folder.path / "metrics.jsonl").read()
