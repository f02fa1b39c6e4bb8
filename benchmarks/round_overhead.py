"""What a round costs beside its optimizer steps: warm trainer against a cold client.

Warm: a real federation of one site on loopback (SuperLink, SuperNode, ClientApp, trainer);
the first round, in which the trainer has already loaded its model to describe itself, and
the following ones count alike. Cold: what Flower's LLM example does, a new process each
round that imports the libraries, loads and quantizes the model and reads the data; nothing
of Flower's transport is added to it. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import json
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


def measure_warm(config: RunConfig, hospitals: Hospitals, folder: Path) -> list[float]:
    """Round time minus step time, in seconds, of each round of a real federation."""
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
    steps = {line["round"]: line["step_seconds"] for line in lines if line["event"] == "site"}
    rounds = {line["round"]: line["seconds"] for line in lines if line["event"] == "round"}
    return [rounds[number] - steps[number] for number in sorted(rounds)]


def measure_cold(config: RunConfig, records: Path, models: Path) -> float:
    """Wall time of one cold client's round minus its step time, in seconds."""
    command = [sys.executable, "-m", "benchmarks.round_overhead", "--cold"]
    command += [config.model_dump_json(), str(records), str(models)]
    started = time.perf_counter()
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return time.perf_counter() - started - float(output.split()[-1])


def run_cold(config_json: str, records: str, models: str) -> None:
    """A client that starts from nothing; prints the seconds inside optimizer steps."""
    from fedqlora.adapter import initial_adapter
    from fedqlora.engine.base import resolve_base
    from fedqlora.engine.data import load_records, tokenize
    from fedqlora.engine.model import BaseModel
    from fedqlora.engine.train import train

    config = RunConfig.model_validate(json.loads(config_json))
    base = BaseModel.load(resolve_base(config.model.base, Path(models)), config.model, config.lora)
    examples = tokenize(
        load_records(Path(records)), base.tokenizer, base.family, config.training.max_length
    )
    adapter = initial_adapter(base.spec(), config.seed, base.given())
    result = train(base, adapter, examples, config.training, seed=1, site="a", round_=1, rounds=1)
    print(result.step_seconds)


def main() -> None:
    """Measure both ways and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cold", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cold:
        run_cold(*options.cold)
        return
    config = configure(options.steps, options.rounds)
    hospitals = Hospitals(config, SITES)
    hospitals.prepare()
    with tempfile.TemporaryDirectory() as folder:
        warm = measure_warm(config, hospitals, Path(folder))
    name = hospitals.names[0]
    cold = [measure_cold(config, hospitals.records(name), hospitals.models) for _ in range(2)]
    ratio = median(warm) / median(cold)
    print(f"{config.model.base}, {options.steps} steps a round, round time minus step time:\n")
    print("| client | seconds a round | ratio |\n|---|---|---|")
    print(f"| warm trainer, over TLS (median of {len(warm)}) | {median(warm):.1f} | {ratio:.2f} |")
    print(f"| cold client, no transport (median of {len(cold)}) | {median(cold):.1f} | 1 |")


if __name__ == "__main__":
    main()
