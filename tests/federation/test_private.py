"""A private run of real processes: receipts that can be recomputed, and no figure that leaves."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedqlora.config import RunConfig, validate
from fedqlora.halves import Method, select_trained
from fedqlora.keys import load_signing_key
from server.bundle import pack
from server.checkpoint import RunFolder
from tests.federation.conftest import ROOT, SITES, Hospitals

pytestmark = pytest.mark.slow


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def begin(hospitals: Hospitals, site: str) -> None:
    """A site's first start: the command of docs/privacy.md, once."""
    state = hospitals.scratch / "processes" / f"trainer-{site}"
    if (state / "ledger.jsonl").exists():
        return
    keys = hospitals.certs / "sites" / site / "current"
    made = call(
        "client", "ledger", "init", "--site", site, "--state", str(state), "--keys", str(keys)
    )
    assert made.returncode == 0, made.stderr


def new_run(hospitals: Hospitals, method: str = "fedavg") -> RunFolder:
    config = {
        "name": "private",
        "model": {"base": "tiny-llama", "compute_dtype": "float32"},
        "lora": {"rank": 4},
        "training": {"steps": 2, "batch_examples": 4, "max_length": 64, "packing": False},
        "data": {"validation_fraction": 0},
        "federation": {"rounds": 2, "wait_seconds": 60},
        "aggregation": {"method": method, "weighting": "uniform"},
        "privacy": {"unit": "patient", "epsilon": 8.0, "delta": 0.01},
    }
    return RunFolder.create(hospitals.runs, validate(RunConfig, config, "test"))


def test_a_private_run_ends_with_receipts_and_without_a_ledger_nothing_trains(
    hospitals: Hospitals,
) -> None:
    lacking = new_run(hospitals)
    assert not hospitals.run(lacking).completed, "without a ledger nothing is known of the past"
    assert "LedgerError" in str(lacking.status()["error"])
    for site in SITES:
        begin(hospitals, site)
    folder = new_run(hospitals)
    result = hospitals.run(folder)
    assert result.completed, folder.status()
    for round_ in (1, 2):
        for line in hospitals.sites(folder, round_):
            assert (line["outcome"], line["examples"], line["tokens"]) == ("used", 0, 0)
            assert not {"train_loss", "validation_loss", "step_seconds"} & line.keys()
    receipts = folder.path / "receipts.jsonl"
    keys = []
    for site in SITES:
        key = load_signing_key(hospitals.certs / "sites" / site / "current" / "signing.key")
        keys += ["--key", f"{site}={key.public_key().public_bytes_raw().hex()}"]
    held = call("fedqlora.verify", "receipts", str(receipts), *keys)
    assert held.returncode == 0, held.stderr
    assert "4 receipts hold" in held.stdout
    lines = receipts.read_text().splitlines()
    # The SuperLink's name for the app that it ships is the digest that policies list.
    said = {json.loads(line)["receipt"]["app_digest"] for line in lines}
    assert said == {pack(ROOT).digest}
    changed = json.loads(lines[0])
    changed["receipt"]["noise_multiplier"] *= 2
    receipts.write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n")
    assert call("fedqlora.verify", "receipts", str(receipts), *keys).returncode == 1


@pytest.mark.parametrize("method", ["exact_svd", "ffa", "fedsvd", "rolora"])
def test_a_private_run_of_every_method_moves_what_trains_and_keeps_the_rest(
    hospitals: Hospitals, method: Method
) -> None:
    for site in SITES:
        begin(hospitals, site)
    folder = new_run(hospitals, method)
    assert hospitals.run(folder).completed, folder.status()
    rounds = [
        load_file(folder.path / "rounds" / f"{round_:04d}" / "adapter.safetensors")
        for round_ in range(3)
    ]
    for round_ in (1, 2):
        assert set(hospitals.outcomes(folder, round_).values()) == {"used"}
        before, after = rounds[round_ - 1 : round_ + 1]
        still = {name for name in after if np.array_equal(before[name], after[name])}
        if method in ("ffa", "rolora"):
            trained = select_trained(after, method, round_)
            assert still == after.keys() - set(trained)
        else:
            assert not still, "the centre makes both factors anew"
    assert len((folder.path / "receipts.jsonl").read_text().splitlines()) == 4
