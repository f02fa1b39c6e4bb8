"""Audit logs of real processes: both sides' fit, and a site whose disk was set back is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedqlora.audit import verify
from fedqlora.head import head_path, read_head
from fedqlora.keys import load_signing_key
from fedqlora.verify import check_head, compare
from tests.federation.conftest import ROOT, SITES, Hospitals

pytestmark = pytest.mark.slow


def site_log(hospitals: Hospitals, site: str) -> Path:
    return hospitals.scratch / "processes" / f"trainer-{site}" / "audit.jsonl"


def test_a_site_whose_disk_was_set_back_is_refused_until_the_centre_decides(
    hospitals: Hospitals,
) -> None:
    folder, centre = hospitals.new_run(rounds=1), hospitals.runs / "audit.jsonl"
    assert hospitals.run(folder).completed, folder.status()
    for site in SITES:
        of_site, of_centre = compare(site, site_log(hospitals, site), centre)
        assert min(of_site, of_centre) >= 2
    coordinator = hospitals.certs / "coordinator"
    key = load_signing_key(coordinator / "signing.key").public_key()
    check_head(centre, verify(centre), read_head(head_path(centre), key))

    log = site_log(hospitals, "a")
    hospitals.federation.stop_process("trainer-a")
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    head_path(log).unlink()
    hospitals.federation.start_process("trainer-a")
    later = hospitals.new_run(rounds=1, min_sites=1, expected_sites=2)
    assert hospitals.run(later).completed, later.status()
    assert hospitals.outcomes(later, 1) == {"b": "used"}

    command = [sys.executable, "-m", "server", "forget", "a"]
    command += ["--coordinator", str(coordinator), "--runs", str(hospitals.runs)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "site a may start a new audit log" in said.stdout
    last = hospitals.new_run(rounds=1)
    assert hospitals.run(last).completed, last.status()
    assert hospitals.outcomes(last, 1) == {"a": "used", "b": "used"}
