"""Few rounds of many local steps, as between hospitals: exact_svd against fedavg.

SmolLM2-135M in NF4 on the ICD-10-CM texts of the demo's three hospitals. Both methods start
from the same adapter, see the same examples in the same order and send bfloat16 deltas; the
first round's training is the same and is done once. Prints held-out loss and accuracy.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from demo.baselines import load_sites
from demo.hospitals import Hospitals
from fedqlora.adapter import Adapter, initial_adapter
from fedqlora.codec import decode, encode
from fedqlora.config import RunConfig, load_run
from fedqlora.engine.data import Tokenized
from fedqlora.engine.evaluate import evaluate
from fedqlora.engine.held_out import HeldOut, load_held_out
from fedqlora.engine.model import BaseModel, resolve_base
from fedqlora.engine.train import train
from fedqlora.halves import select_trained
from server.aggregation.aggregate import Aggregate
from server.aggregation.method import start_aggregation

ROOT = Path(__file__).parents[1]
SITES = 3
METHODS = ("fedavg", "exact_svd")

Deltas = dict[str, tuple[Adapter, int]]


def configure(method: str, options: argparse.Namespace, seed: int) -> RunConfig:
    """The demo's experiment with few rounds and many steps."""
    overrides = {
        "seed": seed,
        "aggregation.method": method,
        "federation.rounds": options.rounds,
        "training.steps": options.steps,
        "evaluation.max_examples": options.max_examples,
    }
    return load_run(ROOT / "experiments" / "icd10.toml", overrides)


def train_sites(
    base: BaseModel,
    sites: dict[str, list[Tokenized]],
    config: RunConfig,
    round_: int,
    before: Aggregate,
) -> Deltas:
    """What the sites would send: each one's delta as it arrives, and its weight."""
    names = select_trained(before.adapter, config.aggregation.method, round_)
    deltas: Deltas = {}
    for site, examples in sites.items():
        trained = train(
            base,
            before.adapter,
            examples,
            config.training,
            seed=config.seed,
            site=site,
            round_=round_,
            rounds=config.federation.rounds,
            residual=before.residual,
            trained=names,
        )
        deltas[site] = (decode(encode(trained.delta, "bfloat16")), trained.examples)
    return deltas


def aggregate(config: RunConfig, round_: int, before: Aggregate, deltas: Deltas) -> Aggregate:
    """One round's aggregation, as the server does it."""
    aggregator = start_aggregation(config, round_, before.adapter, before.residual, {}, {})
    for site, (delta, weight) in deltas.items():
        aggregator.add(site, delta, weight)
    return aggregator.finish()


def compare(options: argparse.Namespace, seed: int, home: Path) -> None:
    """Train both methods from one seed and print a row for each."""
    runs = {method: configure(method, options, seed) for method in METHODS}
    config = runs[METHODS[0]]
    hospitals = Hospitals(config, SITES, home)
    hospitals.prepare()
    base = BaseModel.load(
        resolve_base(config.model.base, hospitals.models), config.model, config.lora
    )
    sites = load_sites(hospitals, base, config)
    held_out: HeldOut = load_held_out(hospitals.held_out, config.evaluation.max_examples)
    start = Aggregate(adapter=initial_adapter(base.spec(), seed, base.given()))
    first = train_sites(base, sites, config, 1, start)
    for method, run in runs.items():
        started = time.monotonic()
        state = aggregate(run, 1, start, first)
        for round_ in range(2, run.federation.rounds + 1):
            state = aggregate(run, round_, state, train_sites(base, sites, run, round_, state))
        scores = evaluate(base, state.adapter, held_out, run.training, state.residual)["all"]
        seconds = time.monotonic() - started
        print(
            f"| {seed} | {method} | {scores['loss']:.4f} | {scores['chapter']:.3f} | "
            f"{state.figures.get('residual_norm', 0):.3g} | "
            f"{state.figures.get('discarded_norm', 0):.3g} | {seconds:.0f} |",
            flush=True,
        )


def main() -> None:
    """Run every seed and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=80, help="local steps of a round")
    parser.add_argument("--max-examples", type=int, help="rows scored of each held-out file")
    parser.add_argument("--home", type=Path, default=ROOT, help="keeps model and records")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    print(f"{options.rounds} rounds of {options.steps} steps, {SITES} hospitals\n")
    print("| seed | method | held-out loss | chapter | residual norm | discarded norm | seconds |")
    print("|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        compare(options, seed, options.home)


if __name__ == "__main__":
    main()
