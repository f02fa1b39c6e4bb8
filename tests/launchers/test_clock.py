"""Clocks that are wrong: a real SuperNode with another time than the SuperLink, by libfaketime."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import libfaketime
import pytest

from demo.processes import LocalFederation
from fedqlora.address import find_free_port
from tests.launchers.conftest import REPOSITORY

LIBRARY = Path(libfaketime.__file__).parent / "vendor/libfaketime/src/libfaketime.so.1"


def at(offset: str) -> dict[str, str]:
    """The environment of a process whose clock is off, by `+200d` or `-1y`; timers stay true."""
    return os.environ | {
        "LD_PRELOAD": str(LIBRARY),
        "FAKETIME": offset,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def try_to_join(
    federation: LocalFederation, keys: Path, folder: Path, offset: str
) -> subprocess.CompletedProcess[str]:
    """A SuperNode with these keys and a wrong clock, run until it gives up."""
    arguments = ["--keys", str(keys), "--superlink", federation.fleet_address]
    arguments += ["--state", str(folder / "state"), "--handover", str(folder / "handover")]
    arguments += ["--clientapp-api", f"127.0.0.1:{find_free_port()}", "--wait-seconds", "1"]
    return subprocess.run(
        [sys.executable, "-m", "client.supernode", *arguments],
        cwd=REPOSITORY,
        env=at(offset),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def scrape(federation: LocalFederation, metric: str) -> float:
    """One figure of the SuperLink's metrics."""
    with urllib.request.urlopen(f"http://{federation.metrics_address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    (line,) = [line for line in lines if line.startswith(metric + " ")]
    return float(line.split()[-1])


@pytest.mark.parametrize(
    ("offset", "sentence"),
    [("+200d", "expired on"), ("-200d", "is not valid before")],
    ids=["ahead", "behind"],
)
def test_a_site_whose_clock_is_months_off_is_told_so_before_it_connects(
    federation: LocalFederation, certs: Path, tmp_path: Path, offset: str, sentence: str
) -> None:
    ended = try_to_join(federation, certs / "sites" / "c", tmp_path, offset)
    assert ended.returncode == 2
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("offset", ["+60", "-400"], ids=["ahead", "behind"])
def test_a_registered_site_whose_clock_is_minutes_off_is_told_so(
    federation: LocalFederation, certs: Path, tmp_path: Path, offset: str
) -> None:
    ended = try_to_join(federation, certs / "sites" / "a", tmp_path, offset)
    assert ended.returncode == 1
    assert "the clocks differ by more than 5 seconds" in ended.stderr
    # With the right time the same keys come past the clock: the site is there already.
    right = try_to_join(federation, certs / "sites" / "a", tmp_path, "+0")
    assert "in use by another SuperNode" in right.stderr


@pytest.mark.parametrize("minutes", [5, -5], ids=["ahead", "behind"])
def test_the_superlinks_metrics_show_whose_clock_is_off(
    federation: LocalFederation, certs: Path, tmp_path: Path, minutes: int
) -> None:
    try_to_join(federation, certs / "sites" / "c", tmp_path, f"{minutes:+d}m")
    skew = scrape(federation, 'fedqlora_site_clock_skew_seconds{site="c"}')
    assert minutes * 60 - 120 < skew < minutes * 60 + 1
    others = scrape(federation, 'fedqlora_site_clock_skew_seconds{site="a"}')
    assert abs(others) < 120


def test_the_superlinks_metrics_show_sites_certificates_and_bad_files(
    federation: LocalFederation, certs: Path
) -> None:
    now = time.time()
    for site in ("a", "b"):
        seen = scrape(federation, f'fedqlora_site_last_seen_timestamp_seconds{{site="{site}"}}')
        assert 0 < seen <= now
        end = f'fedqlora_site_certificate_expiry_timestamp_seconds{{site="{site}"}}'
        assert scrape(federation, end) > now
    assert scrape(federation, "fedqlora_certificate_expiry_timestamp_seconds") > now
    assert scrape(federation, "fedqlora_crl_expiry_timestamp_seconds") > now
    assert scrape(federation, "fedqlora_trusted_authorities") == 1
    bad = 'fedqlora_reload_problem{files="certificate"}'
    failures = 'fedqlora_reload_failures_total{files="certificate"}'
    assert scrape(federation, bad) == 0
    before = scrape(federation, failures)
    path = certs / "superlink" / "current" / "server.crt"
    good = path.read_bytes()
    path.write_bytes(b"garbage")
    try:
        assert scrape(federation, bad) == 1
        assert scrape(federation, failures) == before + 1
    finally:
        path.write_bytes(good)
    assert scrape(federation, bad) == 0
