"""The project's own files agree with each other."""

import io
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from flwr.cli.build import build_fab_from_disk

import fedqlora

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_one() -> None:
    assert PROJECT["project"]["version"] == fedqlora.VERSION


def test_every_dependency_is_pinned() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    wanted = set(PROJECT["project"]["dependencies"])
    for extra in PROJECT["project"]["optional-dependencies"].values():
        wanted |= set(extra)
    assert {name.lower().replace("_", "-") for name in wanted} <= pinned


def test_the_app_that_sites_receive_holds_no_engine_and_nothing_private() -> None:
    names = set(zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))).namelist())
    code = {name for name in names if not name.startswith(".info")} - {"pyproject.toml"}
    assert {"client/app.py", "server/app.py", "fedqlora/protocol_pb2.py"} <= code
    # Shipped code hides what is installed: a part that is imported late would be missing.
    assert {"fedqlora/privacy/accountant.py", "fedqlora/secure/ckks.py"} <= code
    allowed = ("fedqlora/", "server/", "client/app.py", "client/__init__.py")
    assert all(name.startswith(allowed) and name.endswith(".py") for name in code)
    assert not any(name.startswith("fedqlora/engine/") for name in code)


def test_the_stubs_are_those_of_the_proto_file(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}",
            f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}", "fedqlora/protocol.proto",
        ],
        cwd=ROOT,
        check=True,
    )  # fmt: skip
    for made in (tmp_path / "fedqlora").iterdir():
        assert made.read_text() == (ROOT / "fedqlora" / made.name).read_text(), "run `make proto`"
