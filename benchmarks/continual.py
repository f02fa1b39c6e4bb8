"""Three tasks in turn, with and without what keeps earlier ones: one table.

SmolLM2-135M in NF4 on the ICD-10-CM texts of the demo's three hospitals; a task is a group of
chapters (demo/wards.py). Every way starts from the same first task, which is learned once, and has
the same steps. Prints accuracy by task after the last one, average, backward and forward transfer,
forgetting, and accuracy on plain questions before any task and after the last.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from client.examples import Reader
from demo.hospitals import Hospitals
from demo.wards import WARDS
from fedqlora.adapter import Adapter, initial_adapter, rank_of
from fedqlora.codec import decode, encode
from fedqlora.config import RunConfig, load_run
from fedqlora.continual import freeze
from fedqlora.engine.data import Tokenized
from fedqlora.engine.evaluate import evaluate
from fedqlora.engine.held_out import HeldOut, load_held_out
from fedqlora.engine.model import BaseModel, resolve_base
from fedqlora.engine.penalty import Penalty
from fedqlora.engine.probe import GENERAL, score_probe
from fedqlora.engine.train import train
from fedqlora.halves import select_trained
from server.aggregation.method import start_aggregation
from server.checkpoint import Checkpoint, Origin
from server.continuation import make_start
from server.tasks import Scores, Tasks, assemble

ROOT = Path(__file__).parents[1]
TASKS = tuple(WARDS)
FILES = ("icd10-wards", "icd10-new-wards", "icd10-more-wards")


@dataclass(frozen=True)
class Bench:
    """What all ways of one seed share."""

    options: argparse.Namespace
    seed: int
    base: BaseModel
    held_out: HeldOut

    def configure(self, number: int, changes: Mapping[str, object]) -> RunConfig:
        """The experiment of a task; what keeps earlier ones has nothing to do in the first."""
        return configure(self.options, self.seed, number, changes if number else {})

    def score(self, config: RunConfig, at: Checkpoint) -> Scores:
        """Every task's held-out file, and plain questions."""
        training = config.training
        found = evaluate(self.base, at.adapter, self.held_out, training, at.residual)
        found[GENERAL] = score_probe(self.base, at.adapter, training, at.residual)
        return found

    def learn(self, config: RunConfig, start: Checkpoint) -> Checkpoint:
        """All rounds of one task, as trainers and server do them."""
        hospitals = Hospitals(config, self.options.sites, self.options.home)
        sites = {
            name: Reader(name, hospitals.records(name)).read(self.base, "", config, "").training
            for name in hospitals.names
        }
        anchor = freeze(start.adapter, start.residual, config.lora.scale)
        state = start
        for round_ in range(1, config.federation.rounds + 1):
            state = self._round(config, round_, state, sites, anchor)
        return state

    def _round(
        self,
        config: RunConfig,
        round_: int,
        before: Checkpoint,
        sites: Mapping[str, list[Tokenized]],
        anchor: Adapter,
    ) -> Checkpoint:
        method = config.aggregation.method
        lambda_, scale = config.continual.penalty, config.lora.scale
        aggregator = start_aggregation(config, round_, before.adapter, before.residual, {}, {})
        for site, examples in sites.items():
            trained = train(
                self.base,
                before.adapter,
                examples,
                config.training,
                seed=config.seed,
                site=site,
                round_=round_,
                rounds=config.federation.rounds,
                residual=before.residual,
                trained=select_trained(before.adapter, method, round_),
                penalty=Penalty(weight=lambda_, scale=scale, anchor=anchor) if lambda_ else None,
                orthogonal=config.continual.orthogonal,
            )
            delta = decode(encode(trained.delta, "bfloat16"))
            aggregator.add(site, delta, trained.examples)
        result = aggregator.finish()
        return replace(before, adapter=result.adapter, residual=result.residual)


def configure(
    options: argparse.Namespace, seed: int, number: int, changes: Mapping[str, object]
) -> RunConfig:
    """The experiment file of a task with this script's settings."""
    overrides: dict[str, object] = {
        "seed": seed,
        "federation.rounds": options.rounds,
        "training.steps": options.steps,
        "evaluation.max_examples": options.max_examples,
        **({"model.base": options.base} if options.base else {}),
        **({"continual.earlier": TASKS[:number]} if number else {}),
        **changes,
    }
    return load_run(ROOT / "experiments" / f"{FILES[number]}.toml", overrides)


def list_ways(options: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Name -> what it changes from the second task on."""
    rate = configure(options, 1, 0, {}).training.learning_rate
    return {
        "plain": {},
        f"replay {options.replay:.0%}": {"continual.replay_fraction": options.replay},
        f"penalty {options.penalty:g}": {"continual.penalty": options.penalty},
        # With A fixed a higher rate is wanted, as the README's table of methods says.
        "orthogonal, ffa": {
            "continual.orthogonal": True,
            "aggregation.method": "ffa",
            "training.learning_rate": 3 * rate,
        },
    }


def run_seed(options: argparse.Namespace, seed: int) -> None:
    """All ways from one seed, a row each."""
    config = configure(options, seed, 0, {})
    hospitals = Hospitals(config, options.sites, options.home)
    folder = resolve_base(config.model.base, hospitals.models)
    bench = Bench(
        options,
        seed,
        BaseModel.load(folder, config.model, config.lora),
        load_held_out(hospitals.held_out, options.max_examples),
    )
    spec = bench.base.spec()
    start = Checkpoint(
        round=0,
        adapter=initial_adapter(spec, seed, bench.base.given()),
        residual={},
        origin=Origin(base_digest="", family=bench.base.family),
        issued=0,
    )
    untuned = bench.score(config, start)
    first = bench.learn(config, start)
    after_first = bench.score(config, first)
    for way, changes in list_ways(options).items():
        started = time.monotonic()
        end, rows = first, [after_first]
        for number in range(1, len(TASKS)):
            config = bench.configure(number, changes)
            begin = make_start(config, end, TASKS[number - 1])
            if config.aggregation.method != "exact_svd":
                frozen = {"continual.frozen_rank": rank_of(begin.residual)}
                config = bench.configure(number, {**changes, **frozen})
            end = bench.learn(config, begin)
            rows.append(bench.score(config, end))
        before = {"untuned": untuned, "learned": [{"scores": scores} for scores in rows[:-1]]}
        tasks = assemble(config, {config.federation.rounds: rows[-1]}, before)
        assert tasks is not None  # noqa: S101 - every task has a held-out file
        print(describe(seed, way, tasks, time.monotonic() - started), flush=True)


def describe(seed: int, way: str, tasks: Tasks, seconds: float) -> str:
    """One row of the table."""
    figures = [
        *tasks.matrix[-1],
        tasks.average,
        tasks.backward_transfer,
        tasks.forgetting,
        tasks.forward_transfer,
        tasks.general[0],
        tasks.general[-1],
    ]
    cells = ["" if value is None else f"{value:.3f}" for value in figures]
    return f"| {seed} | {way} | {' | '.join(cells)} | {seconds:.0f} |"


def main() -> None:
    """Run every seed and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="rounds of a task")
    parser.add_argument("--steps", type=int, default=40, help="local steps of a round")
    parser.add_argument("--replay", type=float, default=0.1, help="continual.replay_fraction")
    parser.add_argument("--penalty", type=float, default=0.01, help="continual.penalty")
    parser.add_argument("--max-examples", type=int, help="rows scored of each held-out file")
    parser.add_argument("--base", help="another base model of the demo's, such as tiny-llama")
    parser.add_argument("--home", type=Path, default=ROOT, help="keeps model and records")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    for seed in options.seeds:
        for number in range(len(TASKS)):
            config = configure(options, seed, number, {})
            Hospitals(config, options.sites, options.home).prepare()
    print(f"\n{options.rounds} rounds of {options.steps} steps a task, {options.sites} hospitals\n")
    names = ("average", "backward", "forgetting", "forward", "questions before", "after")
    head = ("seed", "way", *TASKS, *names, "seconds")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for seed in options.seeds:
        run_seed(options, seed)


if __name__ == "__main__":
    main()
