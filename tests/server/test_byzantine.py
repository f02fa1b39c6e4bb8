"""Rounds with a site that lies: what a rule keeps out, and what the norms of its factors show."""

from __future__ import annotations

import numpy as np
import pytest

from fedqlora.adapter import Adapter
from fedqlora.errors import ConfigError
from server.checkpoint import Checkpoint, RunFolder
from server.history import read_history
from server.metrics import Metrics
from server.report import render_report
from server.rounds import federate
from tests.server.conftest import House, LearningSite, run_config

A, B = "m.lora_A.weight", "m.lora_B.weight"
HONEST = {"a": 1.0, "b": 1.1, "c": 0.9, "d": 1.05}


def backwards(delta: Adapter) -> Adapter:
    """Well formed, and far in the other direction."""
    return {name: -12 * value for name, value in delta.items()}


def attacked(house: House, rule: str) -> Checkpoint:
    # The ratio would refuse the liar's second update: here the rule alone has to hold.
    aggregation = {"rule": rule, "malicious_sites": 1, "max_norm_ratio": 1e6}
    config = run_config(min_sites=5, sections={"aggregation": aggregation})
    house.folder = RunFolder.create(house.tmp_path / "runs", config)
    for name, target in HONEST.items():
        house.admit(name, LearningSite(target=target))
    house.admit("liar", LearningSite(target=1.0, spoil=backwards))
    return federate(house.folder, house.exchange(), len(house.sites), None)


def test_one_liar_of_five_ruins_the_mean(house: House) -> None:
    assert attacked(house, "mean").adapter[B].mean() < -0.5


@pytest.mark.parametrize(
    "rule", ["median", "trimmed_mean", "geometric_median", "krum", "multi_krum"]
)
def test_a_rule_keeps_the_liar_from_mattering(house: House, rule: str) -> None:
    # Halfway in each of two rounds: 0, 0.5, 0.75 of the honest target.
    np.testing.assert_allclose(attacked(house, rule).adapter[B], 0.75, atol=0.1)


def test_a_site_that_krum_did_not_count_is_on_record_and_in_the_report(house: House) -> None:
    attacked(house, "multi_krum")
    history = read_history(house.folder)
    assert "liar" in history.set_aside[1]
    assert len(history.set_aside[1]) == 3
    assert "aggregation.rule = multi_krum did not count it" in render_report(history)


def test_norm_clipping_bounds_the_liar_in_the_first_round_too(house: House) -> None:
    # Four of five go halfway, the fifth as far back: 3/5 of the way, twice.
    adapter = attacked(house, "norm_clipping").adapter
    assert 0.4 < adapter[B].mean() < 0.75


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda delta: {A: 30 * delta[A], B: delta[B]}, "norm of A is"),
        (lambda delta: {A: delta[A], B: 30 * delta[B]}, "norm of B is"),
        # Neither factor is ten times as long; what they make together is.
        (lambda delta: {A: 6 * delta[A] + 2, B: 6 * delta[B] + 2}, "norm of B A is"),
    ],
    ids=["A", "B", "B A"],
)
def test_an_update_that_grows_past_the_ratio_is_refused_and_its_site_named(
    house: House, spoil: object, said: str
) -> None:
    """In the first round it is honest, so that nothing but the ratio can refuse the second."""
    house.folder = RunFolder.create(house.tmp_path / "runs", run_config())
    for name, target in HONEST.items():
        house.admit(name, LearningSite(target=target))
    turned = LearningSite(target=1.0)
    turned.spoil = lambda delta: spoil(delta) if len(turned.trained) > 1 else delta  # type: ignore[operator]
    house.admit("turned", turned)
    federate(house.folder, house.exchange(), len(house.sites), None)
    lines = Metrics(house.folder.path / "metrics.jsonl").read()
    found = {(line["round"], line["site"]): line for line in lines if line["event"] == "site"}
    assert found[1, "turned"]["outcome"] == "used"
    assert found[2, "turned"]["outcome"] == "invalid"
    assert said in found[2, "turned"]["reason"]
    assert {found[2, name]["outcome"] for name in HONEST} == {"used"}


def test_krum_with_too_few_sites_does_not_start() -> None:
    with pytest.raises(ConfigError, match=r"raise federation.min_sites"):
        run_config(sections={"aggregation": {"rule": "krum"}})
