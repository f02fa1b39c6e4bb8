"""The SuperExec: whom it serves, whose code it starts, and when it leaves to be started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from flwr.common.constant import ErrorCode
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.interceptors import (
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.superexec.run_superexec import _SUPEREXEC_AUTH_METHODS

from demo.processes import LocalFederation, LocalSite
from fedqlora.superexec import choose_pause
from server.bundle import pack
from tests.launchers.conftest import REPOSITORY
from tests.launchers.test_federation import read_answers, wait_for

LOADED = """
import json, os, sys
import fedqlora.superexec
from fedqlora.forkserver import forget_own_modules
forget_own_modules()
sys.path.insert(0, os.getcwd())
loaded = sorted({name.partition(".")[0] for name in sys.modules})
import fedqlora
print(json.dumps([loaded, fedqlora.__file__]))
"""
BUSY = """
import time
from fedqlora import forkserver
forkserver.PROGRAMS["flwr-clientapp"] = lambda: time.sleep(0.5)
server = forkserver.ForkServer()
before = server.busy
for _ in range(3):
    server.start(["flwr-clientapp"])
print(before, server.busy)
deadline = time.monotonic() + 30
while server.busy:
    assert time.monotonic() < deadline
    time.sleep(0.05)
print(server.running)
"""
POLICY = """
[models]
digests = ["00"]

[apps]
digests = ["{digest}"]
"""


def test_the_fork_server_has_loaded_flower_and_nothing_that_an_app_bundle_carries(
    tmp_path: Path,
) -> None:
    shipped = tmp_path / "fedqlora" / "__init__.py"
    shipped.parent.mkdir()
    shipped.touch()
    result = subprocess.run(
        [sys.executable, "-c", LOADED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, imported = json.loads(result.stdout)
    assert "flwr" in loaded
    assert not set(loaded) & {"fedqlora", "client", "server", "certs", "torch"}
    assert imported == str(shipped)


def test_a_fork_server_is_busy_until_the_last_of_its_apps_has_ended() -> None:
    result = subprocess.run(
        [sys.executable, "-c", BUSY], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "True", "True"]


@pytest.mark.parametrize(
    ("waited", "pause"), [(0.0, 0.2), (10.0, 0.2), (25.0, 0.5), (50.0, 1.0), (1e6, 1.0)]
)
def test_who_has_waited_long_is_asked_less_often(waited: float, pause: float) -> None:
    assert choose_pause(waited) == pytest.approx(pause)


def find_option(federation: LocalFederation, process: str, option: str) -> str:
    """The value of a command-line option of a running process."""
    command = Path(f"/proc/{federation.process_ids()[process]}/cmdline").read_text().split("\0")
    return command[command.index(option) + 1]


def ask_for_work(federation: LocalFederation, secret: bytes | None) -> None:
    """What a SuperExec sends to the SuperNode of site a; raises where it is refused."""
    handover = Path(find_option(federation, "supernode-a", "--handover"))
    interceptors = [RuntimeVersionHttpInterceptor(component_name="SuperExec")]
    if secret is not None:
        interceptors.append(
            SuperExecAuthHttpInterceptor(
                master_secret=secret, protected_methods=_SUPEREXEC_AUTH_METHODS
            )
        )
    client = RuntimeHttpClient.from_server_address(
        server_address=find_option(federation, "supernode-a", "--clientapp-api"),
        insecure=False,
        root_certificates=(handover / "ca.crt").read_bytes(),
        interceptors=interceptors,
    )
    try:
        client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
    finally:
        client.close()


@pytest.mark.slow
def test_only_who_knows_the_secret_gets_a_clientapps_work(federation: LocalFederation) -> None:
    handover = Path(find_option(federation, "supernode-a", "--handover"))
    assert {path.name for path in handover.iterdir()} == {"ca.crt", "secret"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in handover.iterdir())
    ask_for_work(federation, (handover / "secret").read_bytes())
    for wrong in (None, b"guessed"):
        with pytest.raises(httpx.HTTPStatusError, match=r"401|403"):
            ask_for_work(federation, wrong)


@pytest.mark.slow
def test_an_app_that_the_policy_does_not_list_is_not_run(
    certs: Path, echo_app: Path, tmp_path: Path
) -> None:
    policies = {}
    for site, digest in {"a": pack(echo_app).digest, "b": "0" * 64}.items():
        policies[site] = tmp_path / f"{site}.toml"
        policies[site].write_text(POLICY.format(digest=digest))
    with LocalFederation(
        certs=certs,
        folder=tmp_path / "logs",
        runs=tmp_path / "runs",
        sites=[LocalSite(name=site, policy=policy) for site, policy in policies.items()],
    ) as federation:
        result = federation.run(echo_app, {"rounds": 2}, timeout_seconds=120)
        # Without the list, both run it: test_a_message_goes_to_every_site_and_back.
        assert read_answers(result.log) == [
            f"round {number} answers ['a.sock{number}', 'error{ErrorCode.INVALID_FAB}']"
            for number in range(2)
        ]
        assert "apps.digests" in federation.read_log("supernode-b")
        assert "flwr-clientapp" not in federation.read_log("clientapps-b")


@pytest.mark.slow
def test_a_superexec_follows_its_supernode_into_a_new_life(
    federation: LocalFederation, echo_app: Path
) -> None:
    before = federation.process_ids()["clientapps-a"]
    federation.restart("supernode-a")  # makes a new certificate and a new secret
    federation.wait_for_sites(["a", "b"])
    wait_for(lambda: federation.process_ids()["clientapps-a"] != before)
    assert "The credentials have changed" in federation.read_log("clientapps-a")
    assert federation.run(echo_app, {"rounds": 1}, timeout_seconds=120).completed


@pytest.mark.slow
def test_a_superexec_whose_fork_server_died_starts_again(
    federation: LocalFederation, echo_app: Path
) -> None:
    before = federation.process_ids()["clientapps-b"]
    subprocess.run(["pkill", "-9", "-P", str(before)], check=True)
    wait_for(lambda: federation.process_ids()["clientapps-b"] != before)
    assert federation.run(echo_app, {"rounds": 1}, timeout_seconds=120).completed


@pytest.mark.slow
def test_new_authorities_wait_until_the_serverapp_has_ended(
    federation: LocalFederation, certs: Path, foreign_certs: Path, echo_app: Path
) -> None:
    before = federation.process_ids()["serverapps"]
    trusted = certs / "superlink" / "current" / "root.crt"
    own = trusted.read_bytes()
    run_id = federation.start_run(echo_app, {"rounds": 6})
    wait_for(lambda: running(federation))
    try:
        trusted.write_bytes(own + (foreign_certs / "authority" / "ca.crt").read_bytes())
        result = federation.wait_for_run(run_id, timeout_seconds=120)
        assert result.completed, result
        assert len(read_answers(result.log)) == 6
        wait_for(lambda: federation.process_ids()["serverapps"] != before)
    finally:
        trusted.write_bytes(own)


def running(federation: LocalFederation) -> bool:
    """Whether a ServerApp is at work."""
    group = str(federation.process_ids()["serverapps"])
    found = subprocess.run(["pgrep", "-g", group, "flwr-serverapp"], capture_output=True)
    return found.returncode == 0
