"""Harder failures, `make test-slow`: network, disk, memory and a stop while a round is trained."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from fedqlora.address import find_free_port
from server.checkpoint import RunFolder
from tests.containers.cluster import ROOT, Cluster, read_run_name, wait_for
from tests.containers.test_failures import LONGER, outcomes

pytestmark = [pytest.mark.containers, pytest.mark.endurance]

ALL_USED = [(round_, site, "used") for round_ in (1, 2) for site in "ab"]
EAT = """
import os
others = [pid for pid in map(int, filter(str.isdigit, os.listdir('/proc'))) if pid > 1]
for pid in set(others) - {os.getpid()}:
    with open(f"/proc/{pid}/oom_score_adj", "w") as file:
        file.write("1000")  # the kernel takes the trainer before this program
blocks = []
while True:
    blocks.append(bytearray(64 << 20))
"""
FILL = """
import json, os
with open("/state/ballast", "wb") as file:
    try:
        while True:
            file.write(bytes(1 << 20))
    except OSError as error:
        print(json.dumps(error.strerror))
"""


def test_a_site_whose_network_is_cut_for_a_minute_costs_no_run_and_comes_back_by_itself(
    cluster: Cluster,
) -> None:
    before = cluster.logs("trainer-a")
    run = cluster.start_run({**LONGER, "federation.min_sites": 1})
    cluster.wait_for_round(run, "a", 1, before)
    network, node = f"{cluster.project}_fleet-a", cluster.container("supernode-a")
    cluster.docker("network", "disconnect", network, node)
    time.sleep(60)
    wait_for(lambda: not cluster.healthy("supernode-a"), 60, "the cut shows in its health")
    cluster.docker("network", "connect", network, node)
    output = run.communicate(timeout=1200)[0]
    assert run.returncode == 0, output
    found = outcomes(RunFolder(ROOT / "runs" / read_run_name(output)))
    assert {(1, "b", "used"), (2, "b", "used")} <= set(found)
    wait_for(lambda: cluster.healthy("supernode-a"), 300, "it is connected again")
    run = cluster.start_run(LONGER)
    output = run.communicate(timeout=1200)[0]
    assert run.returncode == 0, output
    assert outcomes(RunFolder(ROOT / "runs" / read_run_name(output))) == ALL_USED


def test_a_trainer_that_runs_out_of_memory_comes_back_and_does_the_round_again(
    cluster: Cluster,
) -> None:
    before = cluster.logs("trainer-b")
    run = cluster.start_run(LONGER)
    cluster.wait_for_round(run, "b", 1, before)
    name = cluster.container("trainer-b")
    restarts = cluster.inspect("trainer-b")["RestartCount"]
    cluster.docker("exec", name, "python", "-S", "-c", EAT, check=False)
    wait_for(
        lambda: cluster.inspect("trainer-b")["RestartCount"] > restarts, 60, "the kernel kills it"
    )
    output = run.communicate(timeout=1200)[0]
    assert run.returncode == 0, output
    assert outcomes(RunFolder(ROOT / "runs" / read_run_name(output))) == ALL_USED


def test_a_cluster_that_is_stopped_in_mid_training_continues_its_run(cluster: Cluster) -> None:
    before = cluster.logs("trainer-a")
    run = cluster.start_run({**LONGER, "federation.rounds": 3})
    cluster.wait_for_round(run, "a", 2, before)
    cluster.docker("stop", *(cluster.container(service) for service in cluster.services))
    cluster.stop_admin()
    run.communicate(timeout=60)
    for service in ("trainer-a", "superlink", "serverapp"):
        state = cluster.inspect(service)["State"]
        assert not state["OOMKilled"], service
        assert state["ExitCode"] != 137, f"{service} had to be killed"
    cluster.make("up")
    newest = "ls -td /runs/*/ | head -n 1 | xargs basename"
    name = cluster.docker("exec", cluster.container("serverapp"), "sh", "-c", newest).strip()
    output = cluster.make("run", f"RESUME={name}", seconds=1200)
    folder = RunFolder(ROOT / "runs" / read_run_name(output))
    assert folder.status()["status"] == "finished"
    used = {(round_, site) for round_, site, outcome in outcomes(folder) if outcome == "used"}
    assert used == {(round_, site) for round_ in (1, 2, 3) for site in "ab"}


@pytest.fixture
def small() -> Iterator[Cluster]:
    """A cluster of one site whose trainer has 32 megabytes for its state."""
    made = Cluster(1, "fedqlora-small", find_free_port())
    made.make("down")
    name = "a-trainer-state"
    labels = {"project": made.project, "volume": name, "version": "2"}
    options = {"type": "tmpfs", "device": "tmpfs", "o": "size=32m,uid=10001,mode=0700"}
    try:
        made.docker(
            *("volume", "create", "--driver", "local"),
            *(f"--opt={key}={value}" for key, value in options.items()),
            *(f"--label=com.docker.compose.{key}={value}" for key, value in labels.items()),
            f"{made.project}_{name}",
        )
        made.make("up")
        yield made
    finally:
        made.make("down")


def test_a_trainer_whose_disk_is_full_trains_nothing_and_goes_on_once_there_is_room(
    small: Cluster,
) -> None:
    settings = {**LONGER, "federation.min_sites": 1}
    assert "No space left" in small.python("trainer-a", FILL)
    run = small.start_run(settings)
    output = run.communicate(timeout=600)[0]
    assert run.returncode != 0
    assert "Traceback" not in output
    assert "cannot be written" in small.logs("trainer-a")
    assert "optimizer" not in small.logs("trainer-a")
    small.python("trainer-a", "import os; os.remove('/state/ballast'); print(0)")
    run = small.start_run(settings)
    output = run.communicate(timeout=600)[0]
    assert run.returncode == 0, output
