"""A hospital that goes away in the middle of a round, last in this folder: b stays away."""

from __future__ import annotations

import pytest

from tests.federation.conftest import Hospitals

pytestmark = pytest.mark.slow

LONG = 300


def test_a_site_lost_in_mid_round_is_named_and_the_run_goes_on(hospitals: Hospitals) -> None:
    folder = hospitals.new_run(
        rounds=2, steps=LONG, min_sites=1, expected_sites=2, round_deadline_seconds=20
    )
    run = hospitals.start(folder)
    hospitals.wait_until_training(folder, 1, "b")
    for name in ("supernode-b", "trainer-b"):
        hospitals.federation.kill(name)
    assert hospitals.wait(run).completed, folder.status()
    assert hospitals.outcomes(folder, 1) == {"a": "used", "b": "late"}
    assert hospitals.outcomes(folder, 2)["a"] == "used"
    assert hospitals.outcomes(folder, 2).get("b") != "used"
