"""The data report: what a site's own people see of their records, and what nobody does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from client.data_report import report
from fedqlora.errors import DataError

ROOT = Path(__file__).parents[2]
MARK = "narcolepsy"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_rows(count: int, patients: int) -> list[dict[str, Any]]:
    """Records of 20 to 22 characters, dealt to patients in turn."""
    return [
        {
            "prompt": f"{MARK} {i:09d}",
            "completion": "x" * (1 + i % 10),
            "patient_id": f"{MARK}-{i % patients}",
        }
        for i in range(count)
    ]


def test_counts_and_lengths_are_shown_and_no_text_and_no_id(tmp_path: Path) -> None:
    write(tmp_path / "notes.jsonl", make_rows(200, patients=20))
    text, usable = report(tmp_path)
    assert usable
    assert text.splitlines() == [
        "notes.jsonl: 200 records",
        "all: 200 records of 20 patients",
        "length in characters (5 %, half, 95 % are no longer):",
        "  prompt            20      20      20",
        "  completion         1       5      10",
        # Of twenty patients, one lies beyond each outer quantile: that says too much.
        "records of a patient:        -      10       -",
        "",
        "no problems found",
    ]
    assert MARK not in text


def test_small_counts_are_not_shown(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", make_rows(20, patients=3))
    write(tmp_path / "b.jsonl", make_rows(7, patients=7))
    text, _ = report(tmp_path)
    assert "b.jsonl: fewer than 8 records" in text
    write(tmp_path / "b.jsonl", make_rows(8, patients=8))
    assert "b.jsonl: 8 records" in report(tmp_path)[0]
    (tmp_path / "b.jsonl").unlink()
    text, _ = report(tmp_path)
    assert "all: 20 records of fewer than 8 patients" in text
    assert "records of a patient" not in text


def test_what_should_be_looked_at_is_named_with_its_count(tmp_path: Path) -> None:
    rows = make_rows(30, patients=10)
    for row in rows[:9]:
        del row["patient_id"]
    write(tmp_path / "a.jsonl", rows[:9])
    # Ten copies, and ten prompts that have another answer here.
    others = [{**row, "completion": "another"} for row in rows[15:25]]
    write(tmp_path / "b.jsonl", [*rows[9:], *rows[9:19], *others])
    text, usable = report(tmp_path)
    assert usable
    assert "- 9 records without a patient_id" in text
    assert "- 10 records that copy another one" in text
    assert "- 10 prompts with unlike completions" in text


def test_a_faulty_file_is_named_and_the_others_are_reported(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", make_rows(10, patients=10))
    faulty = make_rows(3, patients=3)
    faulty[1]["completion"] = ""
    write(tmp_path / "b.jsonl", faulty)
    text, usable = report(tmp_path)
    assert not usable
    assert "a.jsonl: 10 records" in text
    assert "b.jsonl, line 2, column `completion`: expected text that is not empty" in text
    assert MARK not in text


def test_too_few_records_are_a_problem_and_nothing_else_is_said(tmp_path: Path) -> None:
    text, usable = report(write(tmp_path / "a.jsonl", make_rows(7, patients=7)))
    assert not usable
    assert "fewer than 8 records: a trainer refuses them" in text
    assert "length" not in text
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"holds no \.jsonl"):
        report(empty)


@pytest.mark.parametrize(("count", "status"), [(12, 0), (2, 1)])
def test_the_command_prints_the_report_and_fails_where_no_trainer_could_use_the_records(
    tmp_path: Path, count: int, status: int
) -> None:
    write(tmp_path / "a.jsonl", make_rows(count, patients=count))
    command = [sys.executable, "-m", "client", "data-report", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (status, "")
    assert result.stdout == report(tmp_path)[0] + "\n"
