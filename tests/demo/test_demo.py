"""The demo as a user runs it: one process that starts all others."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from certs.site import make_all
from demo.__main__ import main
from demo.model import NAME
from fedqlora.config import load_run
from server.checkpoint import RunFolder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHORT = """
name = "{name}"
[model]
base = "{base}"
[training]
steps = {steps}
batch_examples = 4
[data]
validation_examples = 2
[evaluation]
max_examples = 4
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def demo(home: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "demo", "--home", str(home), *arguments]


def marked(home: Path) -> dict[str, str]:
    """An environment that every process of a demo inherits, and none of another."""
    return {**os.environ, "FEDQLORA_TEST": str(home)}


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        demo(home, *arguments), cwd=ROOT, env=marked(home), capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def processes_of(home: Path) -> list[str]:
    """Command lines of the living processes of a demo."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().decode().split("\0")
                if f"FEDQLORA_TEST={home}" in environment:
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return found


def list_runs(home: Path) -> set[Path]:
    """The run folders, without what the centre and the sites keep beside them."""
    return {path.parent for path in (home / "runs").glob("*/config.json")}


def write_experiment(home: Path, name: str, *, base: str = "tiny-llama", steps: int = 1) -> Path:
    path = home / f"{name}.toml"
    path.write_text(SHORT.format(name=name, base=base, steps=steps))
    return path


def begin(experiment: Path) -> list[str]:
    return ["run", "--experiment", str(experiment), "--sites", "2", "--rounds", "1"]


def test_an_interrupted_demo_stops_every_process_and_resumes_to_its_table(home: Path) -> None:
    command = demo(home, *begin(write_experiment(home, "real", base=NAME)))
    with subprocess.Popen(
        command, cwd=ROOT, env=marked(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if "round 1: a, b" in line:
                break
        assert len(processes_of(home)) > 12, "".join(printed)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    time.sleep(0.5)
    assert processes_of(home) == []
    (folder,) = list_runs(home)
    result = run(home, "resume", str(folder))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| untuned base |" in result.stdout
    assert "| federated    |" in result.stdout
    assert (folder / "result.md").read_text().strip() in result.stdout
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert processes_of(home) == []
    # Nothing is left to do: resuming a finished run prints its table again.
    again = run(home, "resume", str(folder))
    assert (folder / "result.md").read_text().strip() in again.stdout


def test_a_comparison_runs_its_experiments_and_shows_both(home: Path) -> None:
    for steps in (1, 2):
        write_experiment(home, f"pair-{steps}", steps=steps)
    result = run(home, "compare", "--experiments", "pair-*", "--folder", str(home),
                 "--sites", "2", "--rounds", "1")  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    table = result.stdout.split("\n\n")[-2]
    assert [line.split("-20")[0] for line in table.splitlines()[2:]] == ["| pair-1", "| pair-2"]
    page = Path(result.stdout.splitlines()[-1].removeprefix("comparison: "))
    assert "local steps" in (ROOT / page).read_text()
    assert processes_of(home) == []
    (folder,) = (home / "runs").glob("pair-1-*")
    assert "records of" in (folder / "report.html").read_text()


def test_expired_certificates_are_one_sentence_and_no_run(home: Path, tmp_path: Path) -> None:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=100)
    make_all(tmp_path / "certs" / "out", ["a", "b"], now=past)
    (tmp_path / ".cache").symlink_to(home / ".cache")
    result = run(tmp_path, *begin(write_experiment(tmp_path, "late")))
    assert result.returncode == 1
    assert "is not usable" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--experiment", "none"], "none.toml does not exist"),
        (["run", "--sites", "99"], "SITES=99 is not between 1 and 26"),
        (["run", "--rounds", "0"], "ROUNDS=0 is not a number of rounds"),
        (["resume", "nowhere"], "is not a run folder"),
        (["continue", "nowhere", "--experiment", "icd10-new-wards"], "is not a run folder"),
        (["compare", "--experiments", "none-*"], "matches none-*; there are: "),
        (["compare", "--experiments", "icd10"], "a comparison needs two or more experiments"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_starts(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    result = run(tmp_path, *arguments)
    assert result.returncode in (1, 2)
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["resume", "evaluate", "held-out", "continue"])
def test_a_run_of_a_cluster_is_none_of_the_demos(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder.create(tmp_path, load_run(ROOT / "experiments" / "icd10.toml"))
    more = ["--experiment", "icd10-new-wards"] if command == "continue" else []
    before = sorted(tmp_path.rglob("*"))
    assert main(["--home", str(tmp_path), command, str(folder.path), *more]) == 2
    said = capsys.readouterr().err
    assert "has no demo.json, so the demo did not run it" in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
