"""The demo's three tasks: their records, and a further task on a finished simulation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from demo.codes import CHAPTERS
from demo.wards import WARDS, make_wards
from fedqlora.config import load_run
from fedqlora.engine.held_out import load_held_out
from fedqlora.engine.records import load_records
from fedqlora.errors import ConfigError
from server.checkpoint import RunFolder
from server.history import read_history

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ("icd10-wards", "icd10-new-wards", "icd10-more-wards")


def test_every_chapter_is_in_one_task() -> None:
    assert sorted(chapter for own in WARDS.values() for chapter in own) == sorted(CHAPTERS.values())


def test_a_task_has_its_own_chapters_and_what_the_hospital_had_before(tmp_path: Path) -> None:
    first = make_wards(tmp_path / "one", 3, 1, "medicine", ())
    make_wards(tmp_path / "two", 3, 1, "senses", ("medicine",))
    for site, rows in first.items():
        assert {row["chapter"] for row in rows} <= set(WARDS["medicine"])
        new = load_records(tmp_path / "two" / site)
        assert {record.fields["chapter"] for record in new} <= set(WARDS["senses"])
        earlier = (tmp_path / "two" / site / "earlier" / "medicine.jsonl").read_bytes()
        assert earlier == (tmp_path / "one" / site / "records.jsonl").read_bytes()
        patients = {record.patient for record in new}
        assert not patients & {f"id {row['patient_id']}" for row in rows}
        assert not (tmp_path / "one" / site / "earlier").exists()


def test_every_task_has_a_held_out_file_of_its_chapters_whichever_is_learned(
    tmp_path: Path,
) -> None:
    make_wards(tmp_path, 3, 1, "senses", ("medicine",))
    held_out = load_held_out(tmp_path / "held-out")
    assert set(held_out.subsets) == set(WARDS)
    for name, records in held_out.subsets.items():
        assert {record.fields["chapter"] for record in records} == set(WARDS[name])


def test_a_task_without_records_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no records of task dentistry; set continual.task to"):
        make_wards(tmp_path / "out", 3, 1, "dentistry", ())
    assert list(tmp_path.iterdir()) == []


def test_the_three_experiments_differ_in_their_name_and_task_only() -> None:
    runs = [load_run(ROOT / "experiments" / f"{name}.toml") for name in EXPERIMENTS]
    assert [run.task for run in runs] == list(WARDS)
    same = [run.model_dump(exclude={"name", "continual"}) for run in runs]
    assert same[0] == same[1] == same[2]


TINY = """
name = "{name}"
[model]
base = "tiny-llama"
compute_dtype = "float32"
[lora]
rank = 2
[training]
steps = 2
batch_examples = 4
max_length = 128
[data]
validation_examples = 2
[federation]
rounds = 1
[evaluation]
enabled = true
max_examples = 4
[continual]
task = "{task}"
"""


def demo(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "demo", "--home", str(home), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_further_task_is_simulated_on_a_simulated_run_with_its_sites_and_machines(
    tmp_path: Path,
) -> None:
    for name, task in (("one", "medicine"), ("two", "senses")):
        (tmp_path / f"{name}.toml").write_text(TINY.format(name=name, task=task))
    begun = demo(
        tmp_path, "simulate", "--experiment", str(tmp_path / "one.toml"), "--sites", "2",
        "--workers", "1",
    )  # fmt: skip
    assert begun.returncode == 0, begun.stdout + begun.stderr
    # Who waits for it sees how far it is, and nothing that only libraries' developers need.
    assert "round 1: site b's update folded in" in begun.stderr
    assert "Warning" not in begun.stderr
    (first,) = (tmp_path / "runs" / "simulated").glob("one-*")
    continued = demo(
        tmp_path, "continue", str(first), "--experiment", str(tmp_path / "two.toml"),
        "--set", "continual.replay_fraction=0.5", "--set", "continual.penalty=0.01",
    )  # fmt: skip
    assert continued.returncode == 0, continued.stdout + continued.stderr
    assert "chapter after" in continued.stdout
    (second,) = (tmp_path / "runs" / "simulated").glob("two-*")
    history = read_history(RunFolder(second))
    assert history.status == "finished"
    assert history.tasks is not None
    assert history.tasks.names == ("medicine", "senses")
    assert sorted(history.skew) == ["a", "b"]
    config = json.loads((second / "config.json").read_text())
    assert config["continual"]["starts_from"] == first.name
    refused = demo(
        tmp_path, "continue", str(first), "--experiment", str(tmp_path / "two.toml"),
        "--set", "lora.rank=4",
    )  # fmt: skip
    assert refused.returncode == 2
    assert "lora.rank is 4 and was 2" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert len(list((tmp_path / "runs" / "simulated").glob("two-*"))) == 1
