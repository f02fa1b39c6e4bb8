"""The coordinator's commands as a user types them, against a federation of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from certs.site import make_all
from server.checkpoint import RunFolder
from tests.federation.conftest import ROOT, Hospitals

pytestmark = pytest.mark.slow

EXPERIMENT = """
name = "typed"
[model]
base = "tiny-llama"
compute_dtype = "float32"
[lora]
rank = 4
[training]
steps = 2
batch_examples = 4
max_length = 64
[federation]
rounds = 4
wait_seconds = 60
[evaluation]
enabled = true
"""

# Its configuration has no key `run`.
OTHER_APP = """
[project]
name = "other"
version = "1.0.0"
[tool.flwr.app]
publisher = "tests"
fab-include = ["code.py"]
[tool.flwr.app.components]
serverapp = "code:app"
clientapp = "code:app"
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experiments") / "typed.toml"
    path.write_text(EXPERIMENT)
    return path


def environment(hospitals: Hospitals) -> dict[str, str]:
    """What the admin service of a cluster has, so that nobody types it."""
    return {
        **os.environ,
        "FEDQLORA_CONTROL": hospitals.federation.control_address,
        "FEDQLORA_ROOT_CERTIFICATES": str(hospitals.certs / "superlink" / "current" / "root.crt"),
        "FEDQLORA_COORDINATOR": str(hospitals.certs / "coordinator"),
        "FEDQLORA_RUNS": str(hospitals.runs),
    }


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "server", *arguments]


def server(hospitals: Hospitals, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(hospitals), capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip


def runs_of(hospitals: Hospitals, folder: RunFolder) -> list[str]:
    """Outcomes of all of Flower's runs of a run folder."""
    with hospitals.federation.control() as control:
        return [run.outcome for run in control.list_runs() if run.folder == folder.name]


def test_a_typed_run_prints_its_result_and_then_its_folder(
    hospitals: Hospitals, experiment: Path
) -> None:
    typed = ["run", "--experiment", "typed", "--experiments", str(experiment.parent)]
    result = server(hospitals, *typed, "--set", "federation.rounds=1")
    assert result.returncode == 0, result.stdout + result.stderr
    *_, last = result.stdout.splitlines()
    folder = RunFolder(hospitals.runs / last.removeprefix("run: "))
    assert folder.config().federation.rounds == 1
    # Every site in the roster is expected, although the file says nothing of it.
    assert folder.config().federation.expected_sites == 2
    table = (folder.path / "result.md").read_text()
    assert table in result.stdout
    assert [line.split("|")[1].strip() for line in table.splitlines() if "|" in line][2:] == [
        "untuned base",
        "federated",
    ]
    assert table.splitlines()[-1].startswith("Each round, all sites together: ")
    assert "round 1: 2 sites" in result.stdout
    status = server(hospitals, "status")
    assert status.returncode == 0, status.stderr
    words = [line.split() for line in status.stdout.splitlines()]
    assert {"a", "b"} <= {line[0] for line in words if line[1:2] == ["online"]}
    assert [folder.name, "finished", "1", "of", "1"] in words
    again = server(hospitals, "resume", folder.name)
    assert again.stdout == f"{table}run: {folder.name}\n"
    assert runs_of(hospitals, folder) == ["completed"]


def test_ctrl_c_stops_the_run_and_resume_finishes_it(
    hospitals: Hospitals, experiment: Path
) -> None:
    typed = command("run", "--experiment", str(experiment), "--set", "training.steps=60")
    with subprocess.Popen(
        typed, cwd=ROOT, env=environment(hospitals), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if "round 2: a, b" in line:
                break
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, "".join(printed) + rest
    assert "was stopped" in rest
    folder = RunFolder(hospitals.runs / rest.splitlines()[-1].removeprefix("run: "))
    assert folder.status() == {"status": "stopped", "round": 2}
    assert runs_of(hospitals, folder) == ["stopped"]
    resumed = server(hospitals, "resume", folder.name)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "round 1:" not in resumed.stdout
    assert "| federated    |" in resumed.stdout
    assert folder.status() == {"status": "finished", "round": 4}


def test_a_run_whose_serverapp_was_killed_is_resumed_before_the_superlink_notices(
    hospitals: Hospitals,
) -> None:
    folder = hospitals.new_run(rounds=2, steps=60)
    hospitals.start(folder)
    hospitals.wait_until_training(folder, 1, "a")
    assert hospitals.federation.kill_serverapp()
    result = server(hospitals, "resume", folder.name)
    assert result.returncode == 0, result.stdout + result.stderr
    assert folder.status() == {"status": "finished", "round": 2}
    assert sorted(runs_of(hospitals, folder)) == ["completed", "stopped"]


def test_resuming_a_run_that_is_going_follows_it_and_starts_no_second_one(
    hospitals: Hospitals,
) -> None:
    folder = hospitals.new_run(rounds=1, steps=60)
    run = hospitals.start(folder)
    hospitals.wait_until_training(folder, 1, "a")
    result = server(hospitals, "resume", folder.name)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| federated    |" in result.stdout
    # The folder says that it has finished before Flower knows that its run has ended.
    hospitals.wait(run)
    assert runs_of(hospitals, folder) == ["completed"]


def test_enrolling_registers_every_site_of_the_roster_once(
    hospitals: Hospitals, tmp_path: Path
) -> None:
    assert server(hospitals, "enrol").stdout == "nothing to do\n"
    make_all(tmp_path / "certs", ["x", "y"])
    other = ["enrol", "--coordinator", str(tmp_path / "certs" / "coordinator")]
    first = server(hospitals, *other)
    assert first.returncode == 0, first.stderr
    assert [line.split(":")[0] for line in first.stdout.splitlines()] == ["site x", "site y"]
    assert server(hospitals, *other).stdout == "nothing to do\n"
    words = [line.split()[:2] for line in server(hospitals, "status").stdout.splitlines()]
    assert ["x", "offline"] in words


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["run", "--experiment", "none"],
            "none.toml does not exist; experiments there: education",
        ),
        (["run", "--experiment", "icd10", "--set", "rounds=2"], "rounds is not a known key"),
        (["run", "--experiment", "icd10", "--set", "seed=one"], "is not KEY=VALUE"),
        (["run", "--experiment", "icd10", "--app", "tests"], "app in tests cannot be packed"),
        (["run", "--experiment", "icd10", "--control", "8000"], "is not HOST:PORT"),
        (["run", "--experiment", "icd10", "--coordinator", "no"], "no readable Ed25519"),
        (["resume", "nowhere"], "is not a run folder"),
        (["status", "--root-certificates", "README.md"], "holds no readable certificate"),
        (["enrol", "--control", "127.0.0.1:9", "--wait-seconds", "1"], "does not answer"),
    ],
)
def test_bad_input_is_one_sentence_and_no_run_folder(
    hospitals: Hospitals, arguments: list[str], sentence: str
) -> None:
    before = sorted(hospitals.runs.iterdir())
    result = server(hospitals, *arguments)
    assert result.returncode in (1, 2)
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert sorted(hospitals.runs.iterdir()) == before


def test_a_superlink_of_another_authority_is_not_waited_for(
    hospitals: Hospitals, tmp_path: Path
) -> None:
    make_all(tmp_path / "certs", ["a"])
    foreign = str(tmp_path / "certs" / "superlink" / "current" / "root.crt")
    result = server(hospitals, "status", "--root-certificates", foreign, "--wait-seconds", "600")
    assert result.returncode == 1
    assert "is not one that" in result.stderr


def test_a_run_that_the_superlink_refuses_leaves_no_folder(
    hospitals: Hospitals, tmp_path: Path
) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(OTHER_APP)
    (app / "code.py").write_text("app = None\n")
    before = sorted(hospitals.runs.iterdir())
    result = server(hospitals, "run", "--experiment", "icd10", "--app", str(app))
    assert result.returncode == 1
    assert "The SuperLink refuses the run" in result.stderr
    assert sorted(hospitals.runs.iterdir()) == before, result.stderr
