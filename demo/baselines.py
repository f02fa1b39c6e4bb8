"""Baselines: what the federated model is compared with, trained and scored by the same engine.

untuned                 the base model
hospital alone          the rounds and steps of its share in the federation
pooled                  all records in one place, as many steps as all hospitals together
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from demo.hospitals import Hospitals
from fedqlora.adapter import Adapter, add, initial_adapter
from fedqlora.config import RunConfig
from fedqlora.engine.data import Tokenized, load_records, split_records, tokenize
from fedqlora.engine.evaluate import evaluate
from fedqlora.engine.held_out import HeldOut, load_held_out
from fedqlora.engine.model import BaseModel, resolve_base
from fedqlora.engine.train import train
from fedqlora.training_config import TrainingConfig
from server.table import Scores


def load_sites(hospitals: Hospitals, base: BaseModel, run: RunConfig) -> dict[str, list[Tokenized]]:
    """Each hospital's training examples, split as its own trainer splits them.

    Args:
        hospitals: where the data is.
        base: for its tokenizer.
        run: for the split and the longest example.

    Raises:
        DataError: a hospital's file is missing or wrong.
    """
    sites: dict[str, list[Tokenized]] = {}
    for name in hospitals.names:
        records = load_records(hospitals.records(name), site=name)
        training, _ = split_records(records, run.data.validation_fraction, run.seed)
        sites[name] = tokenize(training, base.tokenizer, base.family, run.training.max_length)
    return sites


def train_centrally(
    base: BaseModel,
    examples: Sequence[Tokenized],
    run: RunConfig,
    training: TrainingConfig,
    *,
    name: str,
) -> Adapter:
    """Train round by round in one place: same start, schedule and fresh optimizer as a site.

    Args:
        base: the model.
        examples: what is trained on.
        run: for seed and rounds.
        training: steps of a round and how they are made.
        name: stands for the site's name in the seed of the data order.
    """
    adapter = initial_adapter(base.spec(), run.seed, base.given())
    rounds = run.federation.rounds
    for round_ in range(1, rounds + 1):
        trained = train(
            base,
            adapter,
            examples,
            training,
            seed=run.seed,
            site=name,
            round_=round_,
            rounds=rounds,
        )
        adapter = add(adapter, trained.delta)
    return adapter


def measure(
    base: BaseModel,
    sites: Mapping[str, Sequence[Tokenized]],
    held_out: HeldOut,
    run: RunConfig,
) -> Iterator[tuple[str, Scores]]:
    """Train and score each hospital alone, then all data pooled."""
    for name, examples in sites.items():
        adapter = train_centrally(base, examples, run, run.training, name=name)
        yield f"hospital {name} alone", evaluate(base, adapter, held_out, run.training)
    pooled = [example for examples in sites.values() for example in examples]
    steps = run.training.steps * len(sites)
    training = run.training.model_copy(update={"steps": steps})
    adapter = train_centrally(base, pooled, run, training, name="pooled")
    yield "all data pooled", evaluate(base, adapter, held_out, run.training)


def score_baselines(run: RunConfig, hospitals: Hospitals) -> dict[str, Scores]:
    """Measure every trained baseline of a run, in this process.

    Args:
        run: the run's configuration, as it was run.
        hospitals: where model and data are.

    Returns:
        The table's rows: each hospital alone, then all data pooled.
    """
    base = BaseModel.load(resolve_base(run.model.base, hospitals.models), run.model, run.lora)
    sites = load_sites(hospitals, base, run)
    held_out = load_held_out(hospitals.held_out, run.evaluation.max_examples)
    rows: dict[str, Scores] = {}
    started = time.monotonic()
    for name, scores in measure(base, sites, held_out, run):
        rows[name] = scores
        print(f"{name}: measured, {time.monotonic() - started:.0f} s so far", flush=True)
    return rows
