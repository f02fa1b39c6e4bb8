"""What a promise to each patient costs in held-out loss: one row for each epsilon.

SmolLM2-135M in NF4 on the ICD-10-CM texts of the demo's three hospitals, the settings of
experiments/icd10-private.toml with one text a patient, in one process. `inf` is the same training,
clipped, without noise. Every row takes as long as every other: many minutes.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path

from client.examples import Reader
from demo.hospitals import Hospitals
from fedqlora.adapter import initial_adapter
from fedqlora.config import RunConfig, load_run
from fedqlora.engine.dp import Unit, group_units, train_privately
from fedqlora.engine.evaluate import evaluate
from fedqlora.engine.held_out import HeldOut, load_held_out
from fedqlora.engine.model import BaseModel, resolve_base
from fedqlora.halves import select_trained
from fedqlora.privacy.accountant import calibrate_noise, default_delta
from server.aggregation.aggregate import Aggregate
from server.aggregation.method import start_aggregation
from server.bundle import REPOSITORY

SITES = 3


def configure(options: argparse.Namespace) -> RunConfig:
    """The private experiment with this script's settings."""
    overrides = {
        "lora.alpha": options.alpha,
        "training.steps": options.steps,
        "training.batch_examples": options.patients,
        "training.learning_rate": options.learning_rate,
        "privacy.max_examples_per_patient": 1,
        "evaluation.max_examples": options.max_examples,
    }
    return load_run(REPOSITORY / "experiments" / "icd10-private.toml", overrides)


def federate(
    base: BaseModel, config: RunConfig, sites: dict[str, list[Unit]], epsilon: float
) -> tuple[Aggregate, list[float]]:
    """All rounds; the last adapter, and each site's noise multiplier."""
    state = Aggregate(adapter=initial_adapter(base.spec(), config.seed, base.given()))
    rounds, noises = config.federation.rounds, {}
    for site, units in sites.items():
        rate = config.training.batch_examples / len(units)
        steps = config.training.steps * rounds
        delta = default_delta(len(units))
        noises[site] = 0.0 if math.isinf(epsilon) else calibrate_noise(epsilon, delta, rate, steps)
    for round_ in range(1, rounds + 1):
        names = select_trained(state.adapter, config.aggregation.method, round_)
        aggregator = start_aggregation(config, round_, state.adapter, state.residual, {}, {})
        for site, units in sites.items():
            trained = train_privately(
                base,
                state.adapter,
                units,
                config.training,
                clip_norm=config.privacy.clip_norm,
                noise_multiplier=noises[site],
                sampling_rate=config.training.batch_examples / len(units),
                round_=round_,
                rounds=rounds,
                residual=state.residual,
                trained=names,
            )
            aggregator.add(site, trained.delta, 1)
        state = aggregator.finish()
    return state, list(noises.values())


def main() -> None:
    """Print one row for each epsilon, as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[math.inf, 8, 3, 1])
    parser.add_argument("--steps", type=int, default=6, help="of a round")
    parser.add_argument("--patients", type=int, default=48, help="expected in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--alpha", type=float, default=8.0, help="lora.alpha")
    parser.add_argument("--max-examples", type=int, default=100, help="rows of a held-out file")
    parser.add_argument("--home", type=Path, default=REPOSITORY, help="keeps model and records")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    config = configure(options)
    hospitals = Hospitals(config, SITES, options.home)
    hospitals.prepare()
    folder = resolve_base(config.model.base, hospitals.models)
    base = BaseModel.load(folder, config.model, config.lora)
    held_out: HeldOut = load_held_out(hospitals.held_out, options.max_examples)
    sites = {}
    for name in hospitals.names:
        data = Reader(name, hospitals.records(name)).read(base, "", config, "")
        sites[name] = group_units(data.training, data.patients, "patient", 1)
    counts = ", ".join(str(len(units)) for units in sites.values())
    print(f"{config.federation.rounds} rounds of {options.steps} steps, {counts} patients\n")
    print("| epsilon | noise multiplier | loss | chapter | seconds |\n|---|---|---|---|---|")
    for epsilon in options.epsilon:
        started = time.monotonic()
        state, noises = federate(base, config, sites, epsilon)
        scores = evaluate(base, state.adapter, held_out, config.training, state.residual)["codes"]
        print(
            f"| {epsilon:g} | {min(noises):.2f} to {max(noises):.2f} | {scores['loss']:.2f} "
            f"| {scores['chapter']:.2f} | {time.monotonic() - started:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
