"""A SuperNode that cannot take part says why in one sentence and does not stay."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from demo.processes import LocalFederation
from fedqlora.address import find_free_port
from tests.launchers.conftest import REPOSITORY
from tests.launchers.leaves import issue

Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def keys(certs: Path, tmp_path: Path) -> Path:
    """A copy of site c's keys that a test may spoil."""
    return shutil.copytree(certs / "sites" / "c" / "current", tmp_path / "keys")


def assert_refused(result: subprocess.CompletedProcess[str], *words: str, status: int = 1) -> None:
    """The last line is the sentence, nothing of a traceback, and the status is not 0."""
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("client.supernode: ")
    assert sentence.endswith(".")
    for word in words:
        assert word in sentence


def test_a_missing_client_certificate_is_named(start_supernode: Start, keys: Path) -> None:
    (keys / "client.crt").unlink()
    assert_refused(start_supernode(keys), "client.crt is missing", "make certs", status=2)


def test_a_missing_node_key_is_named(start_supernode: Start, keys: Path) -> None:
    (keys / "supernode.key").unlink()
    assert_refused(start_supernode(keys), "supernode.key is missing", status=2)


def test_an_expired_client_certificate_is_named(
    start_supernode: Start, keys: Path, certs: Path
) -> None:
    issue(certs, "client", keys, days=-1)
    assert_refused(start_supernode(keys), "expired on", "renew", status=2)


def test_a_certificate_for_another_key_is_refused(
    start_supernode: Start, keys: Path, certs: Path
) -> None:
    shutil.copy(certs / "sites" / "a" / "current" / "client.crt", keys)
    assert_refused(start_supernode(keys), "was not issued for client.key", status=2)


def test_a_server_certificate_is_no_client_certificate(
    start_supernode: Start, keys: Path, certs: Path
) -> None:
    issue(certs, "server", keys)
    (keys / "server.key").rename(keys / "client.key")
    (keys / "server.crt").rename(keys / "client.crt")
    assert_refused(start_supernode(keys), "is not a client certificate", status=2)


def test_a_superlink_of_another_authority_is_not_trusted(
    start_supernode: Start, foreign_certs: Path
) -> None:
    result = start_supernode(foreign_certs / "sites" / "a")
    assert_refused(result, "was not issued by the authority in", "ca.crt")


def test_a_superlink_under_another_name_is_not_trusted(
    start_supernode: Start, keys: Path, federation: LocalFederation
) -> None:
    # 127.1 is another spelling of the loopback address, which no certificate names.
    port = federation.fleet_address.rpartition(":")[2]
    assert_refused(start_supernode(keys, f"127.1:{port}"), "is not for the name 127.1")


def test_the_superlink_refuses_a_client_of_another_authority(
    start_supernode: Start, certs: Path, foreign_certs: Path, tmp_path: Path
) -> None:
    keys = shutil.copytree(foreign_certs / "sites" / "a" / "current", tmp_path / "keys")
    ours = certs / "sites" / "a" / "current" / "ca.crt"
    (keys / "ca.crt").write_bytes((keys / "ca.crt").read_bytes() + ours.read_bytes())
    assert_refused(start_supernode(keys), "refuses the client certificate", "coordinator")


def test_an_unregistered_site_is_told_to_register(start_supernode: Start, keys: Path) -> None:
    assert_refused(start_supernode(keys), "does not know the key", "supernode.pub")


def test_a_superlink_that_is_not_there_is_named(start_supernode: Start, keys: Path) -> None:
    result = start_supernode(keys, f"127.0.0.1:{find_free_port()}")
    assert_refused(result, "cannot be reached", "firewall")
    assert result.stderr.count("Trying again") == 1


def test_an_address_without_a_port_is_refused(start_supernode: Start, keys: Path) -> None:
    assert_refused(start_supernode(keys, "localhost"), "is not HOST:PORT", status=2)


def test_debug_shows_the_traceback(start_supernode: Start, keys: Path) -> None:
    (keys / "client.crt").unlink()
    assert "Traceback" in start_supernode(keys, "", "--debug").stderr


@pytest.mark.parametrize(
    ("spoil", "words"), [("port", "Nothing can listen on"), ("certificate", "expired on")]
)
def test_a_superlink_that_cannot_serve_says_why(
    federation: LocalFederation, certs: Path, tmp_path: Path, spoil: str, words: str
) -> None:
    keys = shutil.copytree(certs / "superlink" / "current", tmp_path / "keys")
    if spoil == "certificate":
        issue(certs, "server", keys, days=-1)
    command = [sys.executable, "-m", "server.superlink", "--certs", str(keys)]
    command += ["--state", str(tmp_path / "state"), "--fleet", federation.fleet_address]
    result = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("server.superlink: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "state").exists()
