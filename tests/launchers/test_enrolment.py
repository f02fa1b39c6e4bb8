"""A site that made its own keys, before the real SuperLink and as a real SuperNode."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from certs.acceptance import accept_reply
from certs.files import CertificateError, read_certificates
from certs.handshake import read_address, serve_serial, wait_for
from certs.renewal import format_serial
from certs.signing import sign_request
from demo.processes import LocalFederation
from fedqlora.address import find_free_port
from tests.certs.sites import apply, confirm, enrol, renew
from tests.launchers.conftest import REPOSITORY, make_certs

pytestmark = pytest.mark.slow


@pytest.fixture
def centre(tmp_path: Path) -> Iterator[tuple[LocalFederation, Path]]:
    """A SuperLink that knows site a, and the folder of all parties."""
    certs = make_certs(tmp_path / "certs", "a")
    folder = tmp_path / "federation"
    with LocalFederation(
        certs=certs, folder=folder / "logs", runs=folder / "runs", sites=[]
    ) as running:
        yield running, certs


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Waits for a condition while a process runs."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the SuperNode has ended"
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def read_serial(home: Path) -> str:
    return format_serial(read_certificates(home / "supernode" / "current" / "client.crt")[0])


def test_a_running_superlink_takes_a_site_that_enrols_and_follows_its_renewal(
    centre: tuple[LocalFederation, Path], tmp_path: Path
) -> None:
    federation, certs = centre
    address = read_address(federation.fleet_address)
    home, stranger = tmp_path / "h", tmp_path / "stranger"
    # The same enrolment at another authority opens nothing here.
    enrol(make_certs(tmp_path / "other", "a"), stranger)
    roots = certs / "superlink" / "current" / "root.crt"
    with pytest.raises(CertificateError, match=r"does not complete a handshake|refuses"):
        serve_serial(address, roots, stranger / "supernode" / "current")

    reply = sign_request(certs, apply(certs, home).path, confirm).reply
    accept_reply(home, reply)
    own = home / "supernode" / "current"
    wait_for(lambda: serve_serial(address, own / "ca.crt", own) and None, 60)

    with federation.control() as control:
        key = control.register(own / "supernode.pub", "h")
    log = tmp_path / "supernode.log"
    command = [sys.executable, "-m", "client.supernode", "--keys", str(home / "supernode")]
    command += ["--superlink", federation.fleet_address, "--state", str(tmp_path / "state")]
    command += ["--handover", str(tmp_path / "handover")]
    command += ["--clientapp-api", f"127.0.0.1:{find_free_port()}"]
    with (
        log.open("wb") as output,
        subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=output) as process,
    ):
        try:

            def is_online() -> bool:
                with federation.control() as control:
                    return key in control.list_online()

            wait_until(is_online, process)
            before = read_serial(home)
            accept_reply(home, renew(certs, home).reply)
            assert read_serial(home) != before
            # Bytes of a log: found wherever a line ends.
            line = re.compile(f"Presenting the certificate with serial {read_serial(home)}")
            wait_until(lambda: bool(line.search(log.read_text())), process)
            assert is_online()
        finally:
            process.terminate()
