"""The app that is shipped: the same bytes for the same files, and no file that it does not need."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from fedqlora.errors import ConfigError
from server.bundle import REPOSITORY, pack

APP = """
[project]
name = "app"
version = "1.0.0"
[tool.flwr.app]
publisher = "tests"
fab-include = ["code.py"]
[tool.flwr.app.components]
serverapp = "code:app"
clientapp = "code:app"
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(APP)
    (tmp_path / "code.py").write_text("app = None\n")
    return tmp_path


def test_the_digest_changes_with_what_is_shipped_and_with_nothing_else(app: Path) -> None:
    digest = pack(app).digest
    (app / "secret.key").write_text("not shipped")
    (app / "code.py").touch()
    assert pack(app).digest == digest
    (app / "code.py").write_text("app = 1\n")
    assert pack(app).digest != digest


def test_what_flower_packs_of_our_own_app_is_what_we_pack() -> None:
    assert pack(REPOSITORY).content == build_fab_from_disk(REPOSITORY)


def test_nothing_that_lies_elsewhere_is_shipped(app: Path) -> None:
    before = pack(app).content
    (app / "more").mkdir()
    (app / "more" / "code.py").symlink_to(app / "pyproject.toml")
    assert pack(app).content == before
    (app / "more" / "code.py").unlink()
    (app / "more" / "code.py").write_text("app = None\n")
    assert pack(app).content != before


def test_the_command_prints_the_digest_of_our_own_app() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "server", "digest"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout == pack(REPOSITORY).digest + "\n"


def test_an_app_that_cannot_be_packed_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be packed") as refused:
        pack(tmp_path)
    assert "\n" not in str(refused.value)


def test_the_bundle_holds_exactly_those_modules_of_the_server_that_the_serverapp_loads() -> None:
    names = zipfile.ZipFile(io.BytesIO(pack(REPOSITORY).content)).namelist()
    shipped = {name for name in names if name.startswith("server/")}
    code = (
        "import json, sys, server.app; "
        "print(json.dumps([m.__file__ for n, m in sys.modules.items() if n.startswith('server')]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    loaded = {Path(path).relative_to(REPOSITORY).as_posix() for path in json.loads(result.stdout)}
    assert shipped == loaded
