"""Stories on local data sets of the same columns: what sites get and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from demo.hospitals import Hospitals
from demo.stories import STORIES, Story, describe, make_story
from fedqlora.config import load_run
from fedqlora.engine.held_out import load_held_out
from fedqlora.engine.records import load_records
from fedqlora.errors import ConfigError, DataError
from tests.tiny_models import save_t5

ROOT = Path(__file__).parents[2]
INTENTS = ("card_arrival", "top_up_failed", "exchange_rate", "lost_or_stolen_card")
BOARDS = ("Mercury_SC", "MCAS_2000", "NYSEDREGENTS", "TIMSS")


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def banking(tmp_path: Path) -> Path:
    """As `mteb/banking77` lies on the hub: two files in the root."""
    for part, count in (("train", 240), ("test", 24)):
        rows: list[dict[str, object]] = [
            {
                "text": f"{part} question {i}",
                "label": i % len(INTENTS),
                "label_text": INTENTS[i % len(INTENTS)],
            }
            for i in range(count)
        ]
        write_rows(tmp_path / "banking" / f"{part}.jsonl", rows)
    return tmp_path / "banking"


@pytest.fixture
def exams(tmp_path: Path) -> Path:
    """As `allenai/ai2_arc` lies on the hub: two configurations that its card lists."""
    folder = tmp_path / "exams"
    for part, count in (("train", 240), ("test", 24)):
        rows: list[dict[str, object]] = []
        for i in range(count):
            labels = list("1234") if i % 5 == 0 else list("ABCDE" if i % 12 == 1 else "ABCD")
            rows.append(
                {
                    "id": f"{BOARDS[i % len(BOARDS)]}_{i}",
                    "question": f"{part} question {i}?",
                    "choices": {"text": [f"option {x}" for x in labels], "label": labels},
                    "answerKey": labels[i % 4],
                }
            )
        write_rows(folder / "ARC-Easy" / f"{part}-0.jsonl", rows)
        write_rows(folder / "ARC-Challenge" / f"{part}-0.jsonl", rows[:1])
    card = "---\nconfigs:\n"
    for name in ("ARC-Challenge", "ARC-Easy"):
        card += f"- config_name: {name}\n  data_files:\n"
        card += "".join(f"  - split: {x}\n    path: {name}/{x}-*\n" for x in ("train", "test"))
    (folder / "README.md").write_text(card + "---\n")
    return folder


def check_folder(out: Path, story: Story, source: Path) -> dict[str, list[dict[str, str]]]:
    """Every file is what trainer and evaluator read, and a seed fixes every byte."""
    dealt = make_story(story, out / "1", 3, seed=1, source=source)
    make_story(story, out / "2", 3, seed=1, source=source)
    names = ["a/records.jsonl", "b/records.jsonl", "c/records.jsonl"]
    names += ["held-out/choices.json", "held-out/test.jsonl"]
    assert sorted(str(f.relative_to(out / "1")) for f in (out / "1").rglob("*.json*")) == names
    assert all((out / "1" / n).read_bytes() == (out / "2" / n).read_bytes() for n in names)
    for name, rows in dealt.items():
        assert [r.prompt for r in load_records(out / "1" / name)] == [r["prompt"] for r in rows]
    counts = [Counter(row[story.label] for row in rows) for rows in dealt.values()]
    assert any(count != counts[0] for count in counts)
    return dealt


def test_banks_get_each_text_once_and_are_scored_on_all_intents(
    banking: Path, tmp_path: Path
) -> None:
    dealt = check_folder(tmp_path / "out", STORIES["finance"], banking)
    prompts = [row["prompt"] for rows in dealt.values() for row in rows]
    assert len(prompts) == len(set(prompts)) == 240
    held_out = load_held_out(tmp_path / "out" / "1" / "held-out")
    assert set(held_out.choices["intent"]) == {name.replace("_", " ") for name in INTENTS}
    assert len(held_out.subsets["test"]) == 24
    assert not {record.prompt for record in held_out.subsets["test"]} & set(prompts)


def test_schools_get_questions_with_four_options_and_are_scored_on_the_letter(
    exams: Path, tmp_path: Path
) -> None:
    dealt = check_folder(tmp_path / "out", STORIES["education"], exams)
    rows = [row for own in dealt.values() for row in own]
    # Every twelfth from the second has five options, unless it is one of those with numbers.
    assert len(rows) == 240 - sum(i % 12 == 1 and i % 5 != 0 for i in range(240))
    numbered = next(row for row in rows if "question 10?" in row["prompt"])
    assert numbered["prompt"].endswith("\nC. option 3\nD. option 4\nAnswer:")
    assert numbered["completion"] == " C"
    assert {row["board"] for row in rows} == {"Mercury", "MCAS", "NYSEDREGENTS", "TIMSS"}
    held_out = load_held_out(tmp_path / "out" / "1" / "held-out")
    assert held_out.choices == {"answer": ("A", "B", "C", "D")}


def test_a_natural_deal_keeps_a_boards_questions_at_one_school(exams: Path, tmp_path: Path) -> None:
    dealt = make_story(STORIES["education"], tmp_path / "out", 2, 1, "natural", exams)
    boards = [{row["board"] for row in rows} for rows in dealt.values()]
    assert not boards[0] & boards[1]
    assert describe(dealt, "board").startswith("a: 1")


def test_another_data_set_and_one_that_is_not_there_are_refused_and_nothing_is_written(
    banking: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for part in ("train", "test"):
        (banking / f"{part}.jsonl").write_text('{"text": "no label"}\n')
    with pytest.raises(DataError, match="has no column 'label_text'"):
        make_story(STORIES["finance"], out, 3, 1, source=banking)
    with pytest.raises(DataError, match="cannot be read"):
        make_story(STORIES["finance"], out, 3, 1, source=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="between 1 and 26"):
        make_story(STORIES["finance"], out, 0, 1, source=banking)
    assert not out.exists()


def test_without_a_hub_the_command_says_so_in_one_sentence(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "demo.stories", "finance", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        line,
        cwd=ROOT,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("data set mteb/banking77 cannot be read (")
    assert done.stderr.count("\n") == 1


def test_a_demo_of_a_story_has_its_records_and_a_fetched_model(
    banking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(ROOT / "experiments" / "finance.toml")
    sites = Hospitals(run, 2, tmp_path)
    assert sites.data.parent == tmp_path / ".cache" / "finance"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_t5(tmp_path / ".cache" / "models" / run.model.base)
    make_story(STORIES["finance"], sites.data, 2, run.seed, source=banking)
    sites.prepare()
    assert set(sites.skew()) == {"a", "b"}
    assert sum(sum(counts.values()) for counts in sites.skew().values()) == 240
    for site in sites.sites():
        assert site.policy is not None
        assert sites.digest() in site.policy.read_text()
    assert load_held_out(sites.held_out).subsets["test"]


@pytest.mark.parametrize("name", sorted(STORIES))
def test_each_story_is_an_experiment_with_a_page(name: str) -> None:
    run = load_run(ROOT / "experiments" / f"{name}.toml")
    assert run.name == name
    page = (ROOT / "docs" / "stories.md").read_text(encoding="utf-8")
    for word in (run.model.base, STORIES[name].dataset, f"make demo EXPERIMENT={name}"):
        assert word in page
