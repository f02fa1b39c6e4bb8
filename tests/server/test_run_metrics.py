"""Metrics: what a scrape shows of finished runs, and that every alert has its metric."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from fedqlora.address import find_free_port
from server.centre_log import FILE
from server.checkpoint import RunFolder
from server.exporter import serve_metrics
from server.rounds import federate
from server.run_metrics import RunMetrics
from tests.server.conftest import House, LearningSite, run_config

MONITORING = Path(__file__).parents[2] / "deploy" / "server" / "monitoring"


@pytest.fixture
def registry(house: House) -> CollectorRegistry:
    """What is scraped after a run of two rounds in which b's updates were of no use."""
    house.folder = RunFolder.create(house.tmp_path / "runs", run_config(min_sites=1))
    house.admit("a", LearningSite(target=4.0))
    house.admit("b", LearningSite(target=4.0, examples=10**6))
    federate(house.folder, house.exchange(), 2, None)
    registry = CollectorRegistry()
    registry.register(RunMetrics(house.folder.path.parent))
    return registry


def test_a_scrape_shows_rounds_outcomes_bytes_and_heads(
    house: House, registry: CollectorRegistry
) -> None:
    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    run = house.folder.name
    assert value("fedqlora_run_round", run=run) == 2
    assert value("fedqlora_site_updates_total", site="a", outcome="used") == 2
    assert value("fedqlora_site_updates_total", site="a", outcome="invalid") == 0
    assert value("fedqlora_site_updates_total", site="b", outcome="invalid") == 2
    assert (value("fedqlora_site_bytes_total", site="a", direction="up") or 0) > 0
    assert value("fedqlora_site_audit_head_number", site="a") == 1
    assert value("fedqlora_site_audit_contradictions_total", site="a") == 0
    lines = len((house.folder.path.parent / FILE).read_text().splitlines())
    assert value("fedqlora_audit_head_number") == lines
    assert value("fedqlora_run_round", run="gone") is None


def test_the_same_figures_come_over_http(house: House, registry: CollectorRegistry) -> None:
    assert registry
    port = find_free_port()
    serve_metrics(RunMetrics(house.folder.path.parent), f"127.0.0.1:{port}")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        assert b'fedqlora_site_updates_total{outcome="used",site="a"} 2.0' in answer.read()


def test_an_empty_folder_of_runs_is_no_error(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    registry.register(RunMetrics(tmp_path))
    assert registry.get_sample_value("fedqlora_audit_head_number") == 0


def test_every_metric_in_an_alert_is_one_that_the_code_exports() -> None:
    rules = (MONITORING / "alerts.yml").read_text()
    wanted = set(re.findall(r"\bfedqlora_[a-z_]+", rules))
    code = "".join(
        (Path(__file__).parents[2] / "server" / name).read_text()
        for name in ("exporter.py", "run_metrics.py")
    )
    exported = set(re.findall(r'"(fedqlora_[a-z_]+)"', code))
    assert wanted
    assert {name.removesuffix("_total") for name in wanted} <= exported
