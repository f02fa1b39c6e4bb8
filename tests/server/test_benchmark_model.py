"""lm-evaluation-harness on a tiny checkpoint: offline, and equal to summed log-probabilities."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedqlora.engine.held_out import load_held_out
from fedqlora.errors import ConfigError
from server.__main__ import main
from server.benchmark_model import benchmark_model, describe_tasks
from server.checkpoint import RunFolder
from tests.server.conftest import run_config
from tests.tiny_models import save_llama

OPTIONS = ["w1", "w2 w3", "w4"]
ROWS = [
    {"prompt": f"w{9 + i} w{20 + 3 * i}", "completion": f" {right} w5", "field": right}
    for i, right in enumerate([*OPTIONS, *OPTIONS])
]


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    folder = tmp_path / "held-out"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "choices.json").write_text(json.dumps({"field": OPTIONS}))
    return folder


@pytest.mark.slow
# The harness and what it needs warn of themselves; what is tested is its figures.
@pytest.mark.filterwarnings("ignore")
def test_the_harness_finds_the_accuracy_of_summed_log_probabilities(
    tmp_path: Path, held_out: Path
) -> None:
    model = save_llama(tmp_path / "merged")
    said = benchmark_model(model, [], held_out, None, "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def score(prompt: str, option: str) -> float:
        start, whole = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {option}")["input_ids"]
        logs = loaded(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(logs[i - 1, whole[i]]) for i in range(len(start), len(whole)))

    right = [
        max(OPTIONS, key=lambda option: score(row["prompt"], option)) == row["field"]
        for row in ROWS
    ]
    figures = json.loads((tmp_path / "benchmark.json").read_text())["tasks"]
    assert figures["heldout_rows_field"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert "heldout_rows_field" in said


def test_a_field_of_many_options_is_no_task(held_out: Path) -> None:
    found = load_held_out(held_out)
    (task,) = describe_tasks(replace(found, choices={**found.choices, "many": ["w"] * 51}))
    assert task["task"] == "heldout_rows_field"
    assert task["target_delimiter"] == " "
    rows = task["custom_dataset"]()["test"]
    assert [row["options"][row["right"]] for row in rows] == [row["field"] for row in ROWS]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task no-such-task"):
        benchmark_model(tmp_path, ["no-such-task"], None, None, "cpu")


def test_nothing_to_score_is_said_before_a_checkpoint_is_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder.create(tmp_path, run_config())
    (folder.path / "adapter").mkdir()
    assert main(["benchmark", str(folder.path)]) == 2
    assert "there is nothing to score; name tasks" in capsys.readouterr().err
    assert not (folder.path / "merged").exists()
