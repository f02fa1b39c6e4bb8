"""Processes that die in the middle of a round: the run ends right or says why it cannot."""

from __future__ import annotations

import time

import pytest
import safetensors.numpy

from server.checkpoint import RunFolder
from tests.federation.conftest import Hospitals

pytestmark = pytest.mark.slow

# Enough steps of the tiny model for a process to be ended in their middle.
LONG = 300
# The runs send nf4, so that what a round leaves out has to survive each failure as well.


def final_bytes(folder: RunFolder) -> bytes:
    newest = folder.latest()
    assert newest is not None
    return safetensors.numpy.save(newest.adapter)


@pytest.fixture(scope="module")
def unbroken(hospitals: Hospitals) -> RunFolder:
    """The run that the broken ones have to equal."""
    folder = hospitals.new_run(rounds=2, steps=LONG, method="fedavg", update="nf4")
    assert hospitals.run(folder).completed, folder.status()
    for site in hospitals.sites(folder, 1):
        # On the wire, with the envelope around it: a tiny adapter's is a tenth of the update.
        assert 5 < site["bytes_down"] / site["bytes_up"] < 8
    return folder


def test_a_run_whose_serverapp_was_killed_resumes_to_the_same_bits(
    hospitals: Hospitals, unbroken: RunFolder
) -> None:
    folder = hospitals.new_run(rounds=2, steps=LONG, method="fedavg", update="nf4")
    hospitals.start(folder)
    hospitals.wait_until_training(folder, 2, "a")
    # Flower notices after a minute; nobody has to wait for it to go on from our checkpoint.
    assert hospitals.federation.kill_serverapp()
    newest = folder.latest()
    assert newest is not None
    assert newest.round == 1
    assert hospitals.run(folder).completed, folder.status()
    assert final_bytes(folder) == final_bytes(unbroken)


def test_a_superlink_restarted_in_mid_round_costs_no_round(
    hospitals: Hospitals, unbroken: RunFolder
) -> None:
    folder = hospitals.new_run(rounds=2, steps=LONG, method="fedavg", update="nf4")
    run = hospitals.start(folder)
    hospitals.wait_until_training(folder, 1, "a")
    hospitals.federation.restart("superlink")
    assert hospitals.wait(run).completed, folder.status()
    assert hospitals.outcomes(folder, 1) == {"a": "used", "b": "used"}
    assert final_bytes(folder) == final_bytes(unbroken)


def test_a_trainer_killed_in_mid_round_carries_the_round_out_after_its_restart(
    hospitals: Hospitals, unbroken: RunFolder
) -> None:
    folder = hospitals.new_run(rounds=2, steps=LONG, method="fedavg", update="nf4")
    run = hospitals.start(folder)
    hospitals.wait_until_training(folder, 2, "b")
    hospitals.federation.kill("trainer-b")
    hospitals.federation.start_process("trainer-b")
    assert hospitals.wait(run).completed, folder.status()
    assert hospitals.outcomes(folder, 2) == {"a": "used", "b": "used"}
    assert final_bytes(folder) == final_bytes(unbroken)


def test_a_run_without_enough_sites_says_who_is_missing(hospitals: Hospitals) -> None:
    folder = hospitals.new_run(rounds=1, min_sites=3, wait_seconds=5)
    started = time.monotonic()
    assert not hospitals.run(folder).completed
    assert "2 of at least 3 sites" in folder.status()["error"]
    assert time.monotonic() - started < 120, "it must end by itself, not by the test's own limit"
