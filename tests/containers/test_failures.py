"""What goes wrong in mid-round: the run still ends with the right result."""

from __future__ import annotations

import json

import pytest

from server.checkpoint import RunFolder
from tests.containers.cluster import ROOT, Cluster, read_run_name
from tests.containers.test_run import SHORT

pytestmark = pytest.mark.containers

LONGER = {
    **SHORT,
    "training.steps": 12,
    "federation.min_sites": 2,
    "evaluation.enabled": "false",
}


def outcomes(folder: RunFolder) -> list[tuple[int, str, str]]:
    """Round, site and outcome of each answer, in order of round and site."""
    lines = (folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [line for line in map(json.loads, lines) if line["event"] == "site"]
    return sorted((line["round"], line["site"], line["outcome"]) for line in found)


def test_a_trainer_that_is_killed_in_mid_round_comes_back_and_does_the_round_again(
    cluster: Cluster,
) -> None:
    before = cluster.logs("trainer-a")
    run = cluster.start_run(LONGER)
    cluster.wait_for_round(run, "a", 1, before)
    cluster.kill("trainer-a")
    output = run.communicate(timeout=900)[0]
    assert run.returncode == 0, output
    assert cluster.inspect("trainer-a")["RestartCount"] >= 1
    assert cluster.logs("trainer-a")[len(before) :].count("round 1 of run") == 2
    assert outcomes(RunFolder(ROOT / "runs" / read_run_name(output))) == [
        (round_, site, "used") for round_ in (1, 2) for site in "ab"
    ]


def test_a_run_survives_a_superlink_that_is_restarted_in_mid_round(cluster: Cluster) -> None:
    before = cluster.logs("trainer-b")
    run = cluster.start_run(LONGER)
    cluster.wait_for_round(run, "b", 1, before)
    cluster.docker("restart", "--time", "5", cluster.container("superlink"))
    output = run.communicate(timeout=900)[0]
    assert run.returncode == 0, output
    assert outcomes(RunFolder(ROOT / "runs" / read_run_name(output))) == [
        (round_, site, "used") for round_ in (1, 2) for site in "ab"
    ]
