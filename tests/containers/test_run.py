"""A run in the cluster: its table, its saved results, and what a second `make up` leaves alone."""

from __future__ import annotations

import json
import re

import pytest

from server.checkpoint import RunFolder
from tests.containers.cluster import ROOT, Cluster, read_run_name, wait_for

pytestmark = pytest.mark.containers

SHORT = {
    "training.steps": 3,
    "federation.rounds": 2,
    "evaluation.every_rounds": 2,
    "evaluation.max_examples": 8,
    "data.validation_examples": 8,
}
SERIALS = """
import hashlib, json, pathlib
files = sorted(pathlib.Path("/keys").rglob("*"))
print(json.dumps([hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()]))
"""


@pytest.fixture(scope="module")
def saved(cluster: Cluster) -> tuple[str, RunFolder]:
    """What `make run` prints, and the folder that it saves."""
    run = cluster.start_run(SHORT)
    output = run.communicate(timeout=900)[0]
    assert run.returncode == 0, output
    return output, RunFolder(ROOT / "runs" / read_run_name(output))


def test_a_run_prints_its_progress_and_its_table(saved: tuple[str, RunFolder]) -> None:
    output, folder = saved
    assert re.search(r"^round 2: 2 sites in", output, re.MULTILINE)
    rows = [line for line in output.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows][-2:] == ["untuned base", "federated"]
    assert (folder.path / "result.md").read_text(encoding="utf-8").strip() in output


def test_the_saved_folder_holds_the_whole_run(saved: tuple[str, RunFolder]) -> None:
    _, folder = saved
    assert folder.status()["status"] == "finished"
    assert folder.config().federation.rounds == 2
    lines = (folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [line for line in map(json.loads, lines) if line["event"] == "site"]
    assert sorted((line["round"], line["site"], line["outcome"]) for line in answers) == [
        (round_, site, "used") for round_ in (1, 2) for site in "ab"
    ]
    assert (folder.path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_status_names_sites_and_runs(cluster: Cluster, saved: tuple[str, RunFolder]) -> None:
    wait_for(lambda: "offline" not in cluster.make("status"), 60, "both sites online")
    shown = cluster.make("status")
    assert shown.count("online") == 2
    assert saved[1].name in shown


def test_the_logs_of_one_site_are_its_own(
    cluster: Cluster,
    saved: tuple[str, RunFolder],  # noqa: ARG001  the run that is logged
) -> None:
    shown = cluster.make("logs", "SITE=2")
    assert "trainer-b" in shown
    assert "trainer-a" not in shown


def test_a_second_start_replaces_no_key(cluster: Cluster) -> None:
    before = {site: cluster.python(f"supernode-{site}", SERIALS) for site in cluster.names}
    assert len(before["a"]) >= 5
    cluster.make("up")
    assert {site: cluster.python(f"supernode-{site}", SERIALS) for site in cluster.names} == before
    assert "nothing to do" in cluster.logs("bootstrap")
