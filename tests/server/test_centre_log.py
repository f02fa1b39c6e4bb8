"""History: neither site nor centre can write its audit log anew without the other seeing it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedqlora.audit import AuditLog, verify
from fedqlora.errors import ConfigError, FederationError, HistoryError
from fedqlora.head import head_path
from fedqlora.verify import compare
from server.centre_log import CentreLog
from server.checkpoint import RunFolder
from server.metrics import Metrics
from server.rounds import federate
from tests.server.conftest import COORDINATOR, House, LearningSite, run_config, site_key

B = "m.lora_B.weight"


def admit(house: House, *names: str) -> None:
    for name in names:
        house.admit(name, LearningSite(target=4.0))


def run(house: House) -> Any:
    """One more run of the same sites."""
    house.folder = RunFolder.create(house.tmp_path / "runs", run_config(min_sites=1))
    return federate(house.folder, house.exchange(), len(house.sites), None).adapter[B]


def outcomes(house: House) -> set[tuple[str, str]]:
    lines = Metrics(house.folder.path / "metrics.jsonl").read()
    return {(line["site"], line["outcome"]) for line in lines if line["event"] == "site"}


def site_log(house: House, site: str) -> Path:
    return house.tmp_path / "state" / site / "audit.jsonl"


def centre_log(house: House) -> Path:
    return house.tmp_path / "runs" / "audit.jsonl"


def events(house: House) -> list[dict[str, Any]]:
    return [json.loads(line) for line in centre_log(house).read_text().splitlines()]


def write_anew(house: House, site: str, lines: int) -> None:
    """What whoever holds a site's disk can do: another history whose chain fits, and a restart."""
    old = site_log(house, site)
    old.unlink()
    head_path(old).unlink(missing_ok=True)
    fresh = AuditLog(old, site_key(site))
    for _ in range(lines):
        fresh.append("nothing happened")
    verify(old)
    node = list(house.sites).index(site) + 1
    kept = dict(house.grid.nodes)
    service = house.admit(site, house.sites[site], started=False)
    house.grid.nodes = {**kept, node: service.exchange}


def test_a_run_leaves_its_instructions_replies_and_adapters_on_record(house: House) -> None:
    admit(house, "a", "b")
    run(house)
    counts = [line["event"] for line in events(house)]
    assert {name: counts.count(name) for name in set(counts)} == {
        "instructed": 6,
        "replied": 6,
        "judged": 4,
        "aggregated": 2,
    }
    assert len({line["adapter"] for line in events(house) if line["event"] == "aggregated"}) == 2
    assert compare("a", site_log(house, "a"), centre_log(house))[0] == 3


@pytest.mark.parametrize("lines", [0, 1, 50], ids=["gone", "as long", "longer"])
def test_a_site_whose_log_was_written_anew_is_refused_and_named(house: House, lines: int) -> None:
    admit(house, "a", "b")
    run(house)
    assert outcomes(house) == {("a", "used"), ("b", "used")}
    write_anew(house, "b", lines)
    np.testing.assert_allclose(run(house), np.full((3, 2), 3.0))
    assert ("a", "used") in outcomes(house)
    assert ("b", "used") not in outcomes(house)
    assert {line["site"] for line in events(house) if line["event"] == "contradicted"} == {"b"}
    with pytest.raises(HistoryError, match="does not contain its line 1 as line"):
        compare("b", site_log(house, "b"), centre_log(house))


def test_without_the_peers_record_the_same_site_is_used(house: House) -> None:
    admit(house, "a", "b")
    run(house)
    write_anew(house, "b", 50)
    centre_log(house).unlink()
    head_path(centre_log(house)).unlink()
    run(house)
    assert outcomes(house) == {("a", "used"), ("b", "used")}


def test_a_site_without_any_log_is_not_used(house: House) -> None:
    admit(house, "a", "b")
    house.admit("c", LearningSite(target=9.0), started=False)
    np.testing.assert_allclose(run(house), np.full((3, 2), 3.0))
    assert not any(site == "c" for site, _ in outcomes(house))


def test_a_site_may_start_a_new_log_once_somebody_decided_so(house: House) -> None:
    admit(house, "a", "b")
    run(house)
    write_anew(house, "b", 1)
    history = CentreLog(centre_log(house).parent, COORDINATOR)
    assert "site b may start a new audit log" in history.forget("b")
    with pytest.raises(ConfigError, match="of a site x"):
        history.forget("x")
    run(house)
    assert outcomes(house) == {("a", "used"), ("b", "used")}
    assert "forgotten" in [line["event"] for line in events(house)]
    compare("b", site_log(house, "b"), centre_log(house))


def test_a_centre_that_writes_its_log_anew_contradicts_what_it_told_the_sites(
    house: House,
) -> None:
    centre = CentreLog(centre_log(house).parent, COORDINATOR)
    centre.record("started", run="hidden")
    site = AuditLog(site_log(house, "a"), site_key("a"))
    told = {"server_number": centre.head.number, "server_hash": centre.head.digest.hex()}
    site.append("training", **told)
    assert compare("a", site.path, centre_log(house)) == (0, 1)
    centre_log(house).unlink()
    CentreLog(centre_log(house).parent, COORDINATOR).record("started", run="harmless")
    verify(centre_log(house))
    with pytest.raises(HistoryError, match="does not contain its line 1"):
        compare("a", site.path, centre_log(house))


def test_the_record_goes_on_over_runs_and_says_how_each_ended(house: House) -> None:
    for fails in (False, True):
        history = CentreLog(centre_log(house).parent, COORDINATOR)
        try:
            with history.run(f"fails-{fails}", run_config()):
                if fails:
                    raise FederationError("too few sites")
        except FederationError:
            pass
    ended = [(line["run"], line["outcome"]) for line in events(house) if line["event"] == "ended"]
    assert ended == [("fails-False", "finished"), ("fails-True", "failed")]
