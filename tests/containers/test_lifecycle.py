"""Keys that change in a cluster that works: `make rotate-certs`, `rotate-ca`, `revoke`."""

from __future__ import annotations

import json
import re

import pytest

from certs.rollover import STAGES
from server.checkpoint import RunFolder
from tests.containers.cluster import ROOT, Cluster, read_run_name, wait_for
from tests.containers.test_failures import LONGER, outcomes

pytestmark = [pytest.mark.containers, pytest.mark.endurance]

# Here SITES is a list of names, where the cluster's own settings have a number.
ALL = "SITES="


def test_a_run_goes_on_while_leaves_and_authority_are_replaced(cluster: Cluster) -> None:
    rounds = 3
    before = cluster.logs("trainer-a")
    run = cluster.start_run({**LONGER, "federation.rounds": rounds})
    cluster.wait_for_round(run, "a", 1, before)
    said = cluster.make("rotate-certs", ALL)
    assert re.search(r"^live: control:9092 serves serial [0-9A-F]+$", said, re.MULTILINE)
    assert re.search(r"^run icd10-.*: still going, \d of 3 rounds done$", said, re.MULTILINE)
    assert said.splitlines()[-1] == "online: a, b"
    for number, stage in enumerate(STAGES, start=1):
        cluster.wait_for_round(run, "a", min(number, rounds), before)
        content = json.loads(cluster.make("rotate-ca", ALL, "JSON=1"))
        assert (content["stage"]["name"], content["online"]) == (stage, ["a", "b"])
        assert len(content["runs"]) == 1
    output = run.communicate(timeout=900)[0]
    assert run.returncode == 0, output
    assert outcomes(RunFolder(ROOT / "runs" / read_run_name(output))) == [
        (round_, site, "used") for round_ in range(1, rounds + 1) for site in "ab"
    ]
    report = json.loads(cluster.make("verify-certs", ALL, "JSON=1"))
    assert report["problems"] == []
    for row in report["rows"]:
        if row["name"] in ("superlink", "site a", "site b"):
            assert row["serial"] == row["live"] is not None


def test_a_revoked_site_leaves_by_one_command_and_the_other_stays(cluster: Cluster) -> None:
    try:
        said = cluster.make("revoke", "SITE=b", ALL)
        assert "still online: a" in said.splitlines()
        assert re.search(r"^site b: .* since .* UTC, its key is burned$", said, re.MULTILINE)
        assert said.splitlines()[-1] == "online: a"
        # Its SuperNode may end at the eviction; the next one, which the engine starts, is refused.
        wait_for(
            lambda: "Refusing the calls of site b" in cluster.logs("superlink"),
            90,
            "site b is refused",
        )
    finally:
        # The site's keys are burned: the other tests get a cluster that is made anew.
        cluster.make("down")
        cluster.make("up")
