"""A simulated federation: the same bits as a deployed one, and sites that stay away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from certs.site import make_all
from demo.commands import LocalSite
from demo.processes import LocalFederation
from fedqlora.config import RunConfig, validate
from fedqlora.engine.base import base_digest
from server.checkpoint import RunFolder
from server.metrics import Metrics
from tests.federation.conftest import ROOT, write_policy, write_records
from tests.tiny_models import save_llama

pytestmark = pytest.mark.slow

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("simulation")
    digest = base_digest(save_llama(made / "models" / "tiny-llama"))
    make_all(made / "certs", NAMES)
    for name in NAMES:
        write_records(made / "data" / name, name)
        write_policy(made / f"{name}.toml", digest)
    write_records(made / "held-out", "held-out")
    return made


def new_run(runs: Path, *, scored: bool = True, **federation: object) -> RunFolder:
    config = {
        "name": "tiny",
        "model": {"base": "tiny-llama", "compute_dtype": "float32"},
        "lora": {"rank": 4},
        "training": {"steps": 5, "batch_examples": 4, "max_length": 64},
        "data": {"validation_examples": 4},
        "federation": {"rounds": 2, "wait_seconds": 300, "expected_sites": 3, **federation},
        "evaluation": {"enabled": scored},
    }
    return RunFolder.create(runs, validate(RunConfig, config, "test"))


def simulate(folder: Path, run: RunFolder, unreliability: float = 0.0) -> str:
    result = subprocess.run(
        [
            sys.executable, "-m", "tests.federation.simulated",
            str(folder), run.name, str(unreliability), *NAMES,
        ],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def test_a_simulation_gives_the_adapter_of_the_deployed_federation_to_the_bit(
    folder: Path,
) -> None:
    simulated = new_run(folder / "simulated" / "runs")
    simulate(folder, simulated)
    deployed = new_run(folder / "runs")
    with LocalFederation(
        certs=folder / "certs",
        folder=folder / "processes",
        runs=folder / "runs",
        sites=[
            LocalSite(name=name, data=folder / "data" / name, policy=folder / f"{name}.toml")
            for name in NAMES
        ],
        models=folder / "models",
        held_out=folder / "held-out",
        environment={"OMP_NUM_THREADS": "1"},
    ) as federation:
        result = federation.run(ROOT, {"run": deployed.name}, timeout_seconds=240)
    assert result.completed, deployed.status()
    ours, theirs = simulated.latest(), deployed.latest()
    assert ours is not None
    assert theirs is not None
    assert ours.round == theirs.round == 2
    assert set(ours.adapter) == set(theirs.adapter)
    assert all(np.array_equal(ours.adapter[name], theirs.adapter[name]) for name in ours.adapter)
    scores = [
        [line["scores"] for line in Metrics(run.path / "metrics.jsonl").read()
         if line["event"] == "evaluation"]
        for run in (simulated, deployed)
    ]  # fmt: skip
    assert len(scores[0]) == 3
    assert scores[0] == scores[1]


def test_a_site_that_stays_away_is_named_and_the_run_goes_on(folder: Path) -> None:
    run = new_run(folder / "simulated" / "runs", scored=False, min_sites=2)
    simulate(folder, run, unreliability=1.0)
    lines = Metrics(run.path / "metrics.jsonl").read()
    outcomes = {
        (line["round"], line["site"]): line["outcome"] for line in lines if line["event"] == "site"
    }
    assert outcomes[1, "a"] == outcomes[2, "b"] == "used"
    assert outcomes[1, "c"] == outcomes[2, "c"] == "lost"
    reasons = [line["reason"] for line in lines if line.get("outcome") == "lost"]
    assert all(reason.endswith("the site's trainer does not answer") for reason in reasons)
    assert run.is_finished
