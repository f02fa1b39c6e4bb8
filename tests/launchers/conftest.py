"""One SuperLink with two sites for all tests of the launchers, and an app that echoes numbers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from demo.processes import LocalFederation, LocalSite
from fedqlora.address import find_free_port

REPOSITORY = Path(__file__).resolve().parents[2]

PYPROJECT = """
[project]
name = "echo"
version = "1.0.0"
dependencies = ["flwr"]

[tool.flwr.app]
publisher = "tests"
fab-include = ["echo/*.py"]

[tool.flwr.app.components]
serverapp = "echo.server:app"
clientapp = "echo.client:app"

[tool.flwr.app.config]
rounds = 1
"""

SERVER = """
import time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    for number in range(context.run_config["rounds"]):
        while len(nodes := list(grid.get_node_ids())) < 2:
            time.sleep(0.2)
        record = RecordDict({"echo": ConfigRecord({"number": number})})
        waiting = set(grid.push_messages(
            [Message(record, dst_node_id=node, message_type="query") for node in nodes]
        ))
        answers = []
        while waiting:
            replies = list(grid.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in replies}
            answers += [
                f"error{reply.error.code}" if reply.has_error() else reply.content["echo"]["number"]
                for reply in replies
            ]
            time.sleep(0.1)
        print("round", number, "answers", sorted(answers), flush=True)
"""

CLIENT = """
import os
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.query()
def query(message, context):
    site = os.environ["FEDQLORA_TRAINER_SOCKET"].rpartition("trainer-")[2]
    number = message.content["echo"]["number"]
    answer = ConfigRecord({"number": f"{site}{number}"})
    return Message(RecordDict({"echo": answer}), reply_to=message)
"""


def make_certs(out: Path, sites: str) -> Path:
    """Makes an authority, a SuperLink and sites with the project's own command."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "certs",
            "make",
            "--development",
            "--out",
            str(out),
            "--sites",
            sites,
        ],
        check=True,
        cwd=REPOSITORY,
        capture_output=True,
    )
    return out


@pytest.fixture(scope="session")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sites a and b for the federation; c is for tests and never registered by it."""
    return make_certs(tmp_path_factory.mktemp("certs") / "out", "a,b,c")


@pytest.fixture(scope="session")
def foreign_certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another authority's SuperLink and site a."""
    return make_certs(tmp_path_factory.mktemp("foreign") / "out", "a")


@pytest.fixture(scope="session")
def echo_app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Flower app whose sites answer with their name and the round's number."""
    app = tmp_path_factory.mktemp("app")
    (app / "echo").mkdir()
    (app / "pyproject.toml").write_text(PYPROJECT)
    (app / "echo" / "__init__.py").write_text("")
    (app / "echo" / "server.py").write_text(SERVER)
    (app / "echo" / "client.py").write_text(CLIENT)
    return app


@pytest.fixture(scope="package")
def federation(certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    """A SuperLink, its SuperExec and the SuperNodes of a and b, over mutual TLS."""
    folder = tmp_path_factory.mktemp("federation")
    sites = [LocalSite(name="a"), LocalSite(name="b")]
    with LocalFederation(
        certs=certs, folder=folder / "logs", runs=folder / "runs", sites=sites
    ) as running:
        yield running


@pytest.fixture
def start_supernode(
    federation: LocalFederation, tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the SuperNode launcher with a key folder until it ends; it should within seconds."""

    def start(keys: Path, superlink: str = "", *extra: str) -> subprocess.CompletedProcess[str]:
        arguments = ["--keys", str(keys), "--superlink", superlink or federation.fleet_address]
        arguments += ["--state", str(tmp_path / "state"), "--handover", str(tmp_path / "handover")]
        arguments += ["--clientapp-api", f"127.0.0.1:{find_free_port()}"]
        return subprocess.run(
            [sys.executable, "-m", "client.supernode", *arguments, "--wait-seconds", "1", *extra],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return start
