"""Messages through real processes: round trips, restarts, deaths, and an end without rest."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.proto.control_pb2 import ListNodesRequest, UnregisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from demo.processes import LocalFederation
from fedqlora.address import find_free_port
from fedqlora.tls import load_identity
from tests.launchers.conftest import REPOSITORY
from tests.launchers.leaves import issue

pytestmark = pytest.mark.slow


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for a condition; fails when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def read_answers(log: str) -> list[str]:
    return re.findall(r"round \d+ answers .*", log)


def test_a_message_goes_to_every_site_and_back(federation: LocalFederation, echo_app: Path) -> None:
    lines: list[str] = []
    result = federation.run(echo_app, {"rounds": 1}, timeout_seconds=120, echo=lines.append)
    assert result.completed, result
    # Each site's ClientApp found the socket of its own trainer in its environment.
    assert read_answers(result.log) == ["round 0 answers ['a.sock0', 'b.sock0']"]
    assert "round 0 answers ['a.sock0', 'b.sock0']" in lines


def test_a_run_survives_a_superlink_that_is_away_for_five_seconds(
    federation: LocalFederation, echo_app: Path
) -> None:
    run_id = federation.start_run(echo_app, {"rounds": 3})
    wait_for(
        lambda: "Sent successfully" in federation.read_log("supernode-a").split(str(run_id))[-1]
    )
    federation.kill("superlink")
    time.sleep(5.0)
    federation.start_process("superlink")
    result = federation.wait_for_run(run_id, timeout_seconds=180)
    assert result.completed, result
    assert read_answers(result.log) == [
        f"round {number} answers ['a.sock{number}', 'b.sock{number}']" for number in range(3)
    ]


def test_both_listeners_follow_a_renewal_while_the_federation_runs(
    federation: LocalFederation, certs: Path, echo_app: Path
) -> None:
    site = load_identity(certs / "sites" / "a", "client")
    serial = issue(certs, "server", certs / "superlink" / "v1")
    for address in (federation.fleet_address, federation.control_address):
        host, _, port = address.rpartition(":")
        assert int(probe_any(host, int(port), site.authority_path), 16) == int(serial, 16)
    assert federation.run(echo_app, {"rounds": 1}, timeout_seconds=120).completed


def probe_any(host: str, port: int, authority: Path) -> str:
    """The serial number that a TLS server shows, whatever it wants from its clients."""
    context = ssl.create_default_context(cafile=str(authority))
    with (
        socket.create_connection((host, port)) as raw,
        context.wrap_socket(raw, server_hostname=host) as secure,
    ):
        return str((secure.getpeercert() or {})["serialNumber"])


def test_a_node_that_is_evicted_leaves_with_status_75_and_then_says_why(
    federation: LocalFederation, certs: Path, tmp_path: Path
) -> None:
    keys = certs / "sites" / "c"
    command = [sys.executable, "-m", "client.supernode", "--keys", str(keys)]
    command += ["--superlink", federation.fleet_address, "--state", str(tmp_path / "state")]
    command += ["--clientapp-api", f"127.0.0.1:{find_free_port()}"]
    command += ["--handover", str(tmp_path / "handover"), "--wait-seconds", "1"]
    with federation.control() as control:
        key = control.register(keys / "current" / "supernode.pub", "c")
        assert control.register(keys / "current" / "supernode.pub", "c") == key
    client = ControlHttpClient.from_server_address(
        server_address=federation.control_address,
        insecure=False,
        root_certificates=(certs / "superlink" / "current" / "root.crt").read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    log = tmp_path / "log"
    with log.open("wb") as output:
        node = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for(lambda: "SuperNode ID" in log.read_text())
        nodes = client.ListNodes(ListNodesRequest()).nodes_info
        (node_id,) = [one.node_id for one in nodes if one.public_key == key]
        client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))
        assert node.wait(timeout=60) == 75
    finally:
        node.kill()
        node.wait()
        client.close()
    again = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert again.returncode == 1
    assert "does not know the key" in again.stderr.splitlines()[-1]


def test_sigterm_ends_a_supernode_with_status_0_and_takes_it_offline(
    federation: LocalFederation,
) -> None:
    federation.stop_process("supernode-b")
    with federation.control() as control:
        assert len(control.list_online()) == 1
    federation.start_process("supernode-b")
    federation.wait_for_sites(["a", "b"])


PROGRAM = """
import json, sys, time
from pathlib import Path
from demo.processes import LocalFederation, LocalSite

folder = Path(sys.argv[2])
with LocalFederation(
    certs=Path(sys.argv[1]), folder=folder, runs=folder / "runs", sites=[LocalSite(name="a")],
) as federation:
    print(json.dumps(federation.process_ids()), flush=True)
    if sys.argv[3] == "fail":
        raise RuntimeError("on purpose")
    time.sleep(600)
"""


@pytest.mark.parametrize("ending", ["fail", "SIGTERM", "SIGINT"])
def test_nothing_survives(certs: Path, tmp_path: Path, ending: str) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(certs), str(tmp_path), ending],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert program.stdout is not None
    groups = json.loads(program.stdout.readline())
    assert set(groups) == {"superlink", "serverapps", "supernode-a", "clientapps-a"}
    for group in groups.values():
        os.killpg(group, 0)
    if ending != "fail":
        program.send_signal(signal.Signals[ending])
    assert program.wait(timeout=60) != 0
    program.stdout.close()
    # The kernel's init reaps what lost its parent, a moment later.
    wait_for(lambda: not any(exists(group) for group in groups.values()), 10)


def exists(group: int) -> bool:
    """Whether a process group has a member left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
