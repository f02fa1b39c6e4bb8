"""What a round costs beside its optimizer steps: warm trainers against cold clients.

Warm: a real federation on loopback (SuperLink, and per site a SuperNode, ClientApp, trainer).
Cold: what Flower's own LLM example does, a new process per site and round that imports the
libraries, loads and quantizes the model, reads the data and runs a trainer
(benchmarks.cold_client); as many at once as there are sites, and nothing of Flower's
transport is added. Twice: as it comes, and with as many threads each as our trainers get.
A round waits for its slowest site, so from the time of a warm round that site's optimizer
steps are taken off, and from the time of the cold clients the median of these: what the steps
cost once everything is loaded. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import os
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


def configure(steps: int, rounds: int, sites: int) -> RunConfig:
    """The demo's run, shortened; no validation, which is not part of either way's overhead."""
    return load_run(
        ROOT / "experiments" / "icd10.toml",
        {
            "training.steps": steps,
            "federation.rounds": rounds,
            "federation.min_sites": sites,
            "federation.expected_sites": sites,
            "data.validation_examples": 0,
            "evaluation.enabled": False,
        },
    )


def measure_warm(
    config: RunConfig, hospitals: Hospitals, folder: Path
) -> tuple[list[float], list[float]]:
    """Seconds of each round of a real federation, and of its slowest site's steps."""
    run = RunFolder.create(folder, config)
    with LocalFederation(
        certs=hospitals.certs,
        folder=folder / "processes",
        runs=folder,
        sites=hospitals.sites(),
        models=hospitals.models,
    ) as federation:
        result = federation.run(ROOT, {"run": run.name})
    if not result.completed:
        raise SystemExit(f"the federation failed: {run.status()}")
    lines = Metrics(run.path / "metrics.jsonl").read()
    seconds = {line["round"]: line["seconds"] for line in lines if line["event"] == "round"}
    steps = {
        number: max(
            line["step_seconds"]
            for line in lines
            if line["event"] == "site" and line["round"] == number
        )
        for number in seconds
    }
    return list(seconds.values()), list(steps.values())


def measure_cold(config: RunConfig, hospitals: Hospitals, environment: dict[str, str]) -> float:
    """Wall time in seconds until the cold clients of all sites have ended, started together."""
    model = hospitals.models / config.model.base
    command = [sys.executable, "-m", "benchmarks.cold_client", str(model)]
    settings = ["--steps", str(config.training.steps), "--rank", str(config.lora.rank)]
    settings += ["--batch", str(config.training.batch_examples)]
    started = time.perf_counter()
    clients = [
        subprocess.Popen(
            [*command, str(hospitals.records(name)), *settings],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for name in hospitals.names
    ]
    statuses = [client.wait() for client in clients]
    if any(statuses):
        raise SystemExit("a cold client failed; run benchmarks.cold_client by itself to see why")
    return time.perf_counter() - started


def main() -> None:
    """Measure both ways and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4, help="rounds of the warm trainer")
    parser.add_argument("--sites", type=int, default=3, help="sites, trained at the same time")
    options = parser.parse_args()
    config = configure(options.steps, options.rounds, options.sites)
    hospitals = Hospitals(config, options.sites, ROOT)
    hospitals.prepare()
    with tempfile.TemporaryDirectory() as folder:
        rounds, steps = measure_warm(config, hospitals, Path(folder))
    threads = str(max(1, (os.cpu_count() or 1) // options.sites))
    cold = {
        "cold clients as they come": {},
        f"cold clients, threads shared out ({threads} each)": {"OMP_NUM_THREADS": threads},
    }
    print(
        f"{config.model.base}, {options.sites} sites, {options.steps} steps of "
        f"{config.training.batch_examples} examples a round ({median(steps):.1f} s once warm):\n",
        flush=True,
    )
    warm = median(whole - part for whole, part in zip(rounds, steps, strict=True))
    print("| clients | a round beside its steps, s | warm / cold |\n|---|---|---|")
    print(
        f"| warm trainers, over TLS (median of {len(rounds)} rounds) | {warm:.1f} | |", flush=True
    )
    for name, environment in cold.items():
        seconds = measure_cold(config, hospitals, environment) - median(steps)
        print(f"| {name} | {seconds:.1f} | {warm / seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
