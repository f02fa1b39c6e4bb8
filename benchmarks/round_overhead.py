"""What a round costs beside its optimizer steps: warm trainer against a cold client.

Warm: a real federation of one site on loopback (SuperLink, SuperNode, ClientApp, trainer).
Cold: what Flower's own LLM example does, a new process each round that imports the libraries,
loads and quantizes the model, reads the data and runs a trainer (benchmarks.cold_client);
nothing of Flower's transport is added to it. From the time of a round on either side the
same is taken off: the median time of the warm engine's optimizer steps, which is what the
steps cost once everything is loaded and compiled. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from demo.hospitals import Hospitals
from demo.processes import LocalFederation
from fedqlora.config import RunConfig, load_run
from server.checkpoint import RunFolder
from server.metrics import Metrics

ROOT = Path(__file__).parents[1]
SITES = 3  # the demo's data; one of its sites takes part


def configure(steps: int, rounds: int) -> RunConfig:
    """The demo's run, shortened; no validation, which is not part of either way's overhead."""
    return load_run(
        ROOT / "experiments" / "icd10.toml",
        {
            "training.steps": steps,
            "federation.rounds": rounds,
            "federation.min_sites": 1,
            "federation.expected_sites": 1,
            "data.validation_examples": 0,
            "evaluation.enabled": False,
        },
    )


def measure_warm(
    config: RunConfig, hospitals: Hospitals, folder: Path
) -> tuple[list[float], list[float]]:
    """Seconds of each round of a real federation, and of the optimizer steps in it."""
    run = RunFolder.create(folder, config)
    with LocalFederation(
        certs=hospitals.certs,
        folder=folder / "processes",
        runs=folder,
        sites=hospitals.sites()[:1],
        models=hospitals.models,
    ) as federation:
        result = federation.run(ROOT, {"run": run.name})
    if not result.completed:
        raise SystemExit(f"the federation failed: {run.status()}")
    lines = Metrics(run.path / "metrics.jsonl").read()
    steps = [line["step_seconds"] for line in lines if line["event"] == "site"]
    return [line["seconds"] for line in lines if line["event"] == "round"], steps


def measure_cold(config: RunConfig, records: Path, model: Path) -> float:
    """Wall time in seconds of one cold client's round."""
    command = [sys.executable, "-m", "benchmarks.cold_client", str(model), str(records)]
    command += ["--steps", str(config.training.steps), "--rank", str(config.lora.rank)]
    command += ["--batch", str(config.training.batch_examples)]
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    return time.perf_counter() - started


def main() -> None:
    """Measure both ways and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4, help="rounds of the warm trainer")
    parser.add_argument("--cold", type=int, default=3, help="rounds of the cold client")
    options = parser.parse_args()
    config = configure(options.steps, options.rounds)
    hospitals = Hospitals(config, SITES, ROOT)
    hospitals.prepare()
    with tempfile.TemporaryDirectory() as folder:
        rounds, steps = measure_warm(config, hospitals, Path(folder))
    records = hospitals.records(hospitals.names[0])
    model = hospitals.models / config.model.base
    cold_rounds = [measure_cold(config, records, model) for _ in range(options.cold)]
    warm, cold = median(rounds) - median(steps), median(cold_rounds) - median(steps)
    print(
        f"{config.model.base}, {options.steps} steps of {config.training.batch_examples} examples "
        f"a round ({median(steps):.1f} s once warm):\n"
    )
    print("| client | a round beside its steps, s | ratio |\n|---|---|---|")
    print(f"| warm trainer, over TLS (median of {len(rounds)}) | {warm:.1f} | {warm / cold:.2f} |")
    print(f"| cold client, no transport (median of {len(cold_rounds)}) | {cold:.1f} | 1 |")


if __name__ == "__main__":
    main()
