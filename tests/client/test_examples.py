"""A site's records as the trainer reads them: once a run, with what is replayed."""

from __future__ import annotations

import json
from pathlib import Path

from client.examples import Reader
from fedqlora.config import ModelConfig, RunConfig, validate
from fedqlora.engine.model import BaseModel
from fedqlora.lora_config import LoraConfig
from tests.tiny_models import save_llama


def write(path: Path, count: int, task: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": f"w{i % 50}", "completion": "w1", "patient_id": f"{task}{i}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def configure(replay: float) -> RunConfig:
    values = {
        "model": {"base": "tiny"},
        "training": {"max_length": 64},
        "continual": {"earlier": ["first"], "replay_fraction": replay},
    }
    return validate(RunConfig, values, "test")


def test_a_further_run_reads_the_records_that_are_there_now(tmp_path: Path) -> None:
    model = ModelConfig(base="tiny", quantization="none", compute_dtype="float32")
    base = BaseModel.load(save_llama(tmp_path / "tiny"), model, LoraConfig(rank=2))
    reader = Reader("a", tmp_path / "data")
    write(tmp_path / "data" / "records.jsonl", 20, "old")
    assert len(reader.read(base, "d", configure(0.0), "one").training) == 18
    write(tmp_path / "data" / "records.jsonl", 40, "new")
    assert len(reader.read(base, "d", configure(0.0), "one").training) == 18
    assert len(reader.read(base, "d", configure(0.0), "two").training) == 36


def test_replayed_records_train_beside_the_new_ones_and_are_not_for_validation(
    tmp_path: Path,
) -> None:
    model = ModelConfig(base="tiny", quantization="none", compute_dtype="float32")
    base = BaseModel.load(save_llama(tmp_path / "tiny"), model, LoraConfig(rank=2))
    reader = Reader("a", tmp_path / "data")
    write(tmp_path / "data" / "records.jsonl", 40, "new")
    write(tmp_path / "data" / "earlier" / "first.jsonl", 100, "old")
    plain = reader.read(base, "d", configure(0.0), "one")
    replayed = reader.read(base, "d", configure(0.2), "one")
    assert replayed.validation == plain.validation
    assert replayed.training[:36] == plain.training
    added = replayed.patients[36:]
    assert len(added) == len(replayed.training) - 36
    assert 8 <= len(added) <= 32, "a fifth of a hundred, three standard deviations"
    assert all(patient.startswith("id old") for patient in added)
