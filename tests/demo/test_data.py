"""The demo's data: disjoint splits, unlike hospitals, patients with several rows, same bytes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from demo.codes import CHAPTERS
from demo.data import (
    HELD_OUT_CODES,
    HELD_OUT_WORDINGS,
    NEWCOMER_TEXTS,
    Row,
    Task,
    deal,
    describe,
    make_data,
    make_task,
)
from demo.layout import count_labels
from demo.names import site_names
from demo.partition import SMALLEST_SITE
from fedqlora.engine.data import load_records
from fedqlora.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task(seed=1)


@pytest.fixture(scope="module")
def hospitals(task: Task) -> dict[str, list[Row]]:
    return deal(task.training, sites=3, seed=1)


def test_no_near_duplicate_is_in_two_lists(task: Task) -> None:
    lists = (task.training, task.codes, task.wordings, task.newcomer)
    groups = [text.group for own in lists for text in own]
    assert len(set(groups)) == len(groups)
    assert not {text.code for text in task.training} & {text.code for text in task.codes}


def test_the_held_out_set_has_every_chapter_alike(task: Task) -> None:
    assert Counter(t.chapter for t in task.codes) == dict.fromkeys(
        CHAPTERS.values(), HELD_OUT_CODES
    )
    assert Counter(t.chapter for t in task.wordings) == dict.fromkeys(
        CHAPTERS.values(), HELD_OUT_WORDINGS
    )
    assert {t.chapter for t in task.training} == set(CHAPTERS.values())


def test_the_hospital_that_takes_no_part_is_as_unlike_as_the_others(task: Task) -> None:
    counts = Counter(text.chapter for text in task.newcomer)
    assert sum(counts.values()) == NEWCOMER_TEXTS
    # Evenly dealt, a chapter would have a seventeenth.
    assert counts.most_common(1)[0][1] > NEWCOMER_TEXTS / 5


def test_the_first_rows_of_the_held_out_set_are_a_mixture(task: Task) -> None:
    assert len({text.chapter for text in task.codes[:40]}) > len(CHAPTERS) / 2


def test_every_training_text_goes_to_one_hospital(
    task: Task, hospitals: dict[str, list[Row]]
) -> None:
    dealt = [row["code"] for rows in hospitals.values() for row in rows]
    assert sorted(dealt) == sorted(text.code for text in task.training)
    assert min(map(len, hospitals.values())) >= SMALLEST_SITE


def test_hospitals_differ_in_their_chapters(hospitals: dict[str, list[Row]]) -> None:
    for rows in hospitals.values():
        shares = [count / len(rows) for count in Counter(r["chapter"] for r in rows).values()]
        # An equal deal would give the largest chapter 1/17 = 0.06 of the rows.
        assert max(shares) > 0.1


def test_patients_have_two_to_five_rows_and_one_hospital(hospitals: dict[str, list[Row]]) -> None:
    for name, rows in hospitals.items():
        patients = Counter(row["patient_id"] for row in rows)
        assert all(patient.startswith(f"{name}-") for patient in patients)
        assert max(patients.values()) <= 5
        # Only the last patient may be left with a single row.
        assert sum(count < 2 for count in patients.values()) <= 1


def test_the_files_are_what_the_engine_reads_and_the_seed_fixes_every_byte(tmp_path: Path) -> None:
    first, second, other = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    hospitals = make_data(first, sites=2, seed=7)
    make_data(second, sites=2, seed=7)
    make_data(other, sites=2, seed=8)
    files = sorted(str(path.relative_to(first)) for path in first.rglob("*.json*"))
    assert files == [
        "a/records.jsonl",
        "b/records.jsonl",
        "held-out/choices.json",
        "held-out/codes.jsonl",
        "held-out/wordings.jsonl",
        "newcomer/choices.json",
        "newcomer/newcomer.jsonl",
    ]
    assert all((first / f).read_bytes() == (second / f).read_bytes() for f in files)
    assert (first / files[0]).read_bytes() != (other / files[0]).read_bytes()

    records = load_records(first / "a")
    assert len(records) == len(hospitals["a"])
    choices = json.loads((first / "held-out" / "choices.json").read_text())
    for record in load_records(first / "held-out"):
        assert record.prompt.endswith("\nBody system:")
        assert record.completion == f" {record.fields['category']}"
        assert record.fields["chapter"] in choices["chapter"]
        assert record.fields["category"] in choices["category"]


def test_the_chapters_of_written_records_are_counted_again(
    tmp_path: Path, hospitals: dict[str, list[Row]]
) -> None:
    make_data(tmp_path / "data", 3, 1)
    counts = count_labels(tmp_path / "data", list(hospitals), "chapter")
    for name, rows in hospitals.items():
        assert {k: n for k, n in counts[name].items() if n} == Counter(r["chapter"] for r in rows)
    with pytest.raises(DataError, match="cannot be read; remove"):
        count_labels(tmp_path / "nowhere", list(hospitals), "chapter")


def test_making_the_data_again_replaces_it(tmp_path: Path) -> None:
    make_data(tmp_path / "d", sites=3, seed=1)
    make_data(tmp_path / "d", sites=2, seed=1)
    found = sorted(path.name for path in (tmp_path / "d").iterdir())
    assert found == ["a", "b", "held-out", "newcomer"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_the_table_counts_records_and_patients() -> None:
    row = {"chapter": "Eye", "patient_id": "a-0001"}
    lines = describe({"a": [row, row], "b": [{**row, "chapter": "Ear"}]}).splitlines()
    cells = {line[:28].strip(): line[28:].split() for line in lines}
    assert cells["records"] == ["2", "1"]
    assert cells["patients"] == ["1", "1"]
    assert cells["Eye"] == ["2", "."]


@pytest.mark.parametrize("count", [0, 27])
def test_a_number_of_sites_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="between 1 and 26"):
        site_names(count)


def test_more_hospitals_than_the_records_can_feed_are_refused(task: Task) -> None:
    with pytest.raises(ConfigError, match="choose fewer SITES"):
        deal(task.training[:300], sites=5, seed=1)
