"""Keys that change under a run of real trainers: every round counts every site."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from certs.inspection import inspect_all
from certs.rollover import STAGES, roll_over
from certs.rotation import rotate as rotate_leaves
from fedqlora.tls import load_identity
from server.checkpoint import RunFolder
from tests.federation.conftest import SITES, Hospitals, running_hospitals
from tests.launchers.members import rotate
from tests.launchers.test_renewal import wait_for

pytestmark = pytest.mark.slow

# Enough steps of the tiny model for keys to change in the middle of a round.
LONG = 200


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    """Hospitals of these tests' own, whose keys they may change."""
    with running_hospitals(tmp_path_factory.mktemp("rotation")) as running:
        yield running


def wait_until_presented(own: Hospitals) -> None:
    """Waits until each site presents the certificate that lies in its folder."""
    for site in SITES:
        serial = load_identity(own.certs / "sites" / site, "client").serial
        line = f"Presenting the certificate with serial {serial}"
        wait_for(lambda site=site, line=line: line in own.federation.read_log(f"supernode-{site}"))  # type: ignore[misc]


def assert_no_round_was_lost(own: Hospitals, folder: RunFolder, rounds: int) -> None:
    assert folder.status() == {"status": "finished", "round": rounds}
    for number in range(1, rounds + 1):
        assert own.outcomes(folder, number) == dict.fromkeys(SITES, "used"), number
    assert "Refusing" not in own.federation.read_log("superlink")


def test_no_round_is_lost_while_leaves_are_rotated_and_the_authority_is_rolled_over(
    own: Hospitals,
) -> None:
    centre = own.certs / "superlink"
    before = load_identity(centre, "server").serial
    processes = own.federation.process_ids()
    rounds = 1 + len(STAGES)
    folder = own.new_run(rounds=rounds, steps=LONG)
    run = own.start(folder)
    changes: list[Callable[[], object]] = [lambda: rotate_leaves(own.certs)]
    changes += [lambda stage=stage: check_stage(own, stage) for stage in STAGES]  # type: ignore[misc]
    for number, change in enumerate(changes, start=1):
        own.wait_until_training(folder, number, "a")
        change()
        wait_until_presented(own)
    assert own.wait(run).completed, folder.status()
    assert_no_round_was_lost(own, folder, rounds)
    after = own.federation.process_ids()
    for name in ("superlink", *(f"supernode-{site}" for site in SITES)):
        assert after[name] == processes[name]
    assert load_identity(centre, "server").serial != before
    assert inspect_all(own.certs).problems == []


def check_stage(own: Hospitals, stage: str) -> None:
    assert roll_over(own.certs).name == stage


@pytest.mark.parametrize(
    ("party", "role", "process"),
    [("superlink", "server", "superlink"), ("sites/a", "client", "supernode-a")],
)
def test_a_garbage_leaf_in_mid_round_is_named_and_costs_no_round(
    own: Hospitals, party: str, role: str, process: str
) -> None:
    rounds = 2
    folder = own.new_run(rounds=rounds, steps=LONG)
    run = own.start(folder)
    own.wait_until_training(folder, 1, "a")
    keys = own.certs / party
    good = (keys / "current" / f"{role}.crt").read_bytes()
    said = len(own.federation.read_log(process))
    rotate(keys, {f"{role}.crt": b"garbage"})
    wait_for(lambda: "the new one is bad" in own.federation.read_log(process)[said:])
    assert any(f"{role}.crt" in one for one in inspect_all(own.certs).problems)
    own.wait_until_training(folder, rounds, "a")
    rotate(keys, {f"{role}.crt": good})
    assert own.wait(run).completed, folder.status()
    assert_no_round_was_lost(own, folder, rounds)
    assert inspect_all(own.certs).problems == []
