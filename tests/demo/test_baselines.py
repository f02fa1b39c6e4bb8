"""Baselines train as a site trains, with the steps that the comparison asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from demo.baselines import measure, train_centrally
from fedqlora.adapter import add, initial_adapter
from fedqlora.config import RunConfig, validate
from fedqlora.engine.data import Record, Tokenized
from fedqlora.engine.evaluate import evaluate
from fedqlora.engine.held_out import HeldOut
from fedqlora.engine.model import BaseModel
from fedqlora.engine.train import train
from tests.engine.conftest import load
from tests.tiny_models import save_llama

SITES = {
    "a": [Tokenized((3 + i, 4 + i), (5 + i, 1)) for i in range(6)],
    "b": [Tokenized((30 + i,), (31 + i, 32 + i, 1)) for i in range(6)],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder: Path = save_llama(tmp_path_factory.mktemp("models") / "tiny-llama", layers=1)
    return load(folder, nf4=False)


@pytest.fixture
def run() -> RunConfig:
    values = {
        "model": {"base": "tiny-llama", "quantization": "none"},
        "lora": {"rank": 4},
        "training": {"steps": 2, "batch_examples": 3, "learning_rate": 0.01},
        "federation": {"rounds": 2},
    }
    return validate(RunConfig, values, "test")


def test_a_hospital_alone_trains_the_rounds_that_it_trains_in_the_federation(
    base: BaseModel, run: RunConfig
) -> None:
    alone = train_centrally(base, SITES["a"], run, run.training, name="a")
    adapter = initial_adapter(base.spec(), run.seed, base.given())
    for round_ in (1, 2):
        trained = train(
            base,
            adapter,
            SITES["a"],
            run.training,
            seed=run.seed,
            site="a",
            round_=round_,
            rounds=2,
        )
        adapter = add(adapter, trained.delta)
    assert all(np.array_equal(alone[name], adapter[name]) for name in adapter)


def test_pooled_data_gets_the_steps_of_all_hospitals_together(
    base: BaseModel, run: RunConfig
) -> None:
    record = Record(messages=None, prompt="w1", completion="w2 w3", patient="p", fields={})
    held_out = HeldOut({"codes": [record]}, {})
    rows = dict(measure(base, SITES, held_out, run))
    assert list(rows) == ["hospital a alone", "hospital b alone", "all data pooled"]

    training = run.training.model_copy(update={"steps": 4})
    pooled = train_centrally(base, [*SITES["a"], *SITES["b"]], run, training, name="pooled")
    assert rows["all data pooled"] == evaluate(base, pooled, held_out, run.training)
