"""A private demo: one command, a ledger for each hospital, and none in the place of a lost one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from demo.hospitals import Hospitals
from fedqlora.config import load_run
from server.checkpoint import RunFolder

ROOT = Path(__file__).parents[2]
PRIVATE = """
name = "tiny-private"
[model]
base = "tiny-llama"
compute_dtype = "float32"
[lora]
rank = 2
[training]
steps = 1
batch_examples = 4
max_length = 128
packing = false
[data]
validation_fraction = 0
[federation]
rounds = 1
[aggregation]
method = "ffa"
weighting = "uniform"
[privacy]
unit = "patient"
epsilon = 8.0
"""


def simulate(home: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "demo", "--home", str(home), "simulate",
        "--experiment", str(home / "tiny-private.toml"), "--sites", "2", "--workers", "1",
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_private_experiment_is_a_run_that_can_be() -> None:
    config = load_run(ROOT / "experiments" / "icd10-private.toml")
    assert (config.privacy.unit, config.privacy.epsilon) == ("patient", 8.0)


@pytest.mark.slow
def test_a_private_run_takes_one_command_and_a_lost_ledger_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "tiny-private.toml").write_text(PRIVATE)
    done = simulate(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = tmp_path / "runs" / "simulated"
    (run,) = runs.glob("tiny-private-*")
    lines = (run / "receipts.jsonl").read_text().splitlines()
    receipts = [json.loads(line)["receipt"] for line in lines]
    assert sorted(one["site"] for one in receipts) == ["a", "b"]
    ledger = runs / ".sites" / "b" / "ledger.jsonl"
    spent = ledger.read_bytes()
    # The next run goes on with it.
    hospitals = Hospitals(RunFolder(run).config(), 2, tmp_path, simulated=True)
    hospitals.make_ledgers(runs)
    assert ledger.read_bytes() == spent
    ledger.unlink()
    refused = simulate(tmp_path)
    assert refused.returncode == 1
    assert "shows that this site had a ledger; restore it" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not ledger.exists()
    assert list(runs.glob("tiny-private-*")) == [run]
