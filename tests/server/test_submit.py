"""A run's settings: the file, what is typed, and the sites in the roster, in that order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedqlora.errors import CheckpointError, ConfigError
from server.checkpoint import RunFolder
from server.metrics import Metrics
from server.status import list_run
from server.submit import configure, find_experiment, parse_settings, read_scores, write_result
from tests.server.conftest import House, run_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "short.toml"
    path.write_text('[model]\nbase = "tiny"\n')
    return path


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("training.steps=7", 7),
        ("training.steps = 7", 7),
        ("training.learning_rate=2e-3", 2e-3),
        ('model.base="google/flan-t5-base"', "google/flan-t5-base"),
        ('lora.targets=["q", "v"]', ["q", "v"]),
        ('name="a=b"', "a=b"),
        ("evaluation.enabled=true", True),
    ],
)
def test_a_setting_is_a_toml_value(typed: str, value: object) -> None:
    assert list(parse_settings([typed]).values()) == [value]


@pytest.mark.parametrize(
    "typed", ["seed", "seed=", "=1", "a..b=1", "model.base=bare", "seed=1\nother=2", ""]
)
def test_what_is_no_setting_is_refused(typed: str) -> None:
    with pytest.raises(ConfigError, match="is not KEY=VALUE"):
        parse_settings([typed])


def test_a_setting_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        parse_settings(["seed=1", "seed=2"])


def test_a_key_below_a_value_is_refused(experiment: Path) -> None:
    with pytest.raises(ConfigError, match="base is no section"):
        configure(experiment, {"model.base.first": 1}, 3)


@pytest.mark.parametrize(
    ("written", "typed", "expected", "least"),
    [
        ("", {}, 5, 2),  # nobody says anything: all five, or after a while two
        ("expected_sites = 4", {}, 4, 2),
        ("min_sites = 3", {}, 5, 3),
        ("min_sites = 3", {"federation.min_sites": 4}, 5, 4),
        ("", {"federation.expected_sites": 1}, 1, 1),
    ],
)
def test_every_registered_site_is_expected_unless_file_or_user_say_otherwise(
    experiment: Path, written: str, typed: dict[str, int], expected: int, least: int
) -> None:
    experiment.write_text(experiment.read_text() + f"[federation]\n{written}\n")
    federation = configure(experiment, typed, 5).federation
    assert (federation.expected_sites, federation.min_sites) == (expected, least)


def test_a_file_that_wants_more_sites_than_there_are_is_refused(experiment: Path) -> None:
    experiment.write_text(experiment.read_text() + "[federation]\nmin_sites = 3\n")
    with pytest.raises(ConfigError, match="expected_sites is smaller than min_sites"):
        configure(experiment, {}, 2)


def test_an_encrypted_run_is_refused_where_what_adds_it_up_is_not_installed(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "homomorphic_encryption.enabled": True,
        "homomorphic_encryption.key_site": "a",
        "aggregation.method": "ffa",
        "federation.min_sites": 3,
    }
    assert configure(experiment, settings, 3).homomorphic_encryption.enabled
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(ConfigError, match="build with EXTRAS=he"):
        configure(experiment, settings, 3)


def test_an_unknown_experiment_names_those_that_there_are(experiment: Path) -> None:
    assert find_experiment("short", experiment.parent) == experiment
    assert find_experiment(str(experiment), Path("elsewhere")) == experiment
    with pytest.raises(ConfigError, match="experiments there: short"):
        find_experiment("long", experiment.parent)


def test_the_result_is_the_first_and_the_last_score(house: House) -> None:
    metrics = Metrics(house.folder.path / "metrics.jsonl")
    for round_, loss in ((0, 3.0), (2, 2.0), (4, 1.0)):
        scores = {"notes": {"examples": 8, "loss": loss}}
        metrics.append("evaluation", round=round_, scores=scores)
    rows = read_scores(house.folder)
    assert [row["notes"]["loss"] for row in rows.values()] == [3.0, 1.0]
    text = write_result(house.folder, rows)
    assert (house.folder.path / "result.md").read_text() == text + "\n"
    assert text.splitlines()[-1].split() == ["|", "federated", "|", "1.000", "|"]


def test_a_run_without_scores_says_so_instead_of_a_table(house: House) -> None:
    assert "evaluation.enabled = false" in write_result(house.folder, read_scores(house.folder))


def test_the_result_ends_with_the_bytes_of_a_round(house: House) -> None:
    metrics = Metrics(house.folder.path / "metrics.jsonl")
    for round_, site, down, up in ((1, "a", 1000, 500), (1, "b", 1000, 0), (2, "a", 1000, 200_100)):
        facts = {"outcome": "used", "bytes_down": down, "bytes_up": up}
        metrics.append("site", round=round_, site=site, **facts)
    last = write_result(house.folder, {}).splitlines()[-1]
    assert last == "Each round, all sites together: 1.5 kB down, 0.10 MB up."


def test_a_run_that_nobody_works_on_any_more_is_listed_as_cut_off(house: House) -> None:
    folder = house.folder
    folder.set_status("running", round=1)
    assert list_run(folder, {folder.name}) == (folder.name, "running", "1 of 2")
    assert list_run(folder, set()) == (folder.name, "cut off", "1 of 2")
    folder.set_status("finished", round=2)
    assert list_run(folder, set()) == (folder.name, "finished", "2 of 2")


def test_only_one_process_works_on_a_run_and_a_dead_one_does_not_count(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, run_config())
    code = (
        "import sys, time; from pathlib import Path; from server.checkpoint import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).claim(0): print('claimed', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder.path)],
        cwd=ROOT,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        with (
            pytest.raises(CheckpointError, match="another process still works on"),
            folder.claim(0.2),
        ):
            pass
        other.kill()
    with folder.claim(0):
        pass
