"""A hospital's ten minutes, for real: from the kit to a connected site, an upgrade, the way back.

The coordinator's SuperLink is a process of this machine; the site knows it by the address that
containers have for their host, as it would know a SuperLink elsewhere.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from certs.site import make_all
from deploy.image import read_image
from deploy.kit import build_kit
from deploy.signature import fingerprint_key, open_kit_key
from fedqlora.address import find_free_port
from tests.containers.cluster import ROOT, wait_for
from tests.deploy.kits import unpack

# Two starts of a site and one that fails: minutes where other work takes the processors.
pytestmark = [pytest.mark.containers, pytest.mark.endurance, pytest.mark.timeout(1500)]

SITE = "kit-test"
PROJECT = f"fedqlora-{SITE}"
IMAGE = os.environ.get("FEDQLORA_CLIENT_IMAGE", "fedqlora-client:cpu")
BROKEN = "fedqlora-client:kit-test-broken"


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Site:
    """A kit's program, called as an administrator does."""

    def __init__(self, program: Path) -> None:
        self.program = program

    def call(self, *arguments: str | Path) -> tuple[int, str]:
        """Exit status and everything that the program said."""
        done = subprocess.run(
            [self.program, *arguments],
            # What an administrator's shell exports must not reach Compose.
            env={**os.environ, "DEVICE": "cuda", "FEDQLORA_SITE": "mallory"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=580,
            check=False,
        )
        return done.returncode, done.stdout

    def __call__(self, *arguments: str | Path) -> str:
        status, said = self.call(*arguments)
        assert status == 0, said
        return said


@contextmanager
def superlink(certs: Path, folder: Path, port: int) -> Iterator[str]:
    """A SuperLink on all addresses; gives the address of its Control API."""
    control = f"127.0.0.1:{find_free_port()}"
    command = [sys.executable, "-m", "server.superlink", "--certs", certs / "superlink" / "current"]
    command += ["--state", folder / "state", "--fleet", f"0.0.0.0:{port}", "--control", control]
    command += ["--superexec-secret", folder / "secret"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        wait_for(lambda: "Uvicorn running" in (folder / "log").read_text(), 120, "SuperLink")
        yield control
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def removed() -> Iterator[None]:
    """Removes whatever the site has started and made in the engine."""
    yield
    for kind, command in (
        ("ps -aq", "rm -f"),
        ("volume ls -q", "volume rm"),
        ("network ls -q", "network rm"),
    ):
        found = docker(*kind.split(), "--filter", f"label=com.docker.compose.project={PROJECT}")
        if found:
            docker(*command.split(), *found.split())
    broken = docker("images", "--quiet", BROKEN)
    if broken:
        docker("rmi", "--force", broken)


def find_host() -> str:
    """This machine's address as containers know it: their way out."""
    program = """if 1:
        import socket
        routes = [line.split() for line in open("/proc/net/route")][1:]
        way = next(route[2] for route in routes if route[1] == "00000000")
        print(socket.inet_ntoa(bytes.fromhex(way)[::-1]))"""
    return docker("run", "--rm", "--entrypoint=python", IMAGE, "-c", program)


def break_image() -> None:
    """An image like the site's, all of whose programs end at once."""
    container = docker("create", IMAGE, "none")
    change = 'ENTRYPOINT ["python", "-c", "raise SystemExit(\'broken on purpose\')"]'
    docker("commit", "--change", change, container, BROKEN)
    docker("rm", container)


def append_round() -> None:
    """A line in the running trainer's log, in place of a round that takes minutes."""
    program = """if 1:
        from pathlib import Path
        from fedqlora.audit import AuditLog
        from fedqlora.keys import load_signing_key
        key = load_signing_key(Path("/keys/current/signing.key"))
        log = AuditLog(Path("/state/audit.jsonl"), key)
        log.append("trained", run="icd10", round=1, bytes_out=1234)"""
    docker("exec", f"{PROJECT}-trainer-1", "python", "-c", program)


def edit_audit_log() -> None:
    """Whoever has the host's disk makes a sent update look smaller."""
    docker("run", "--rm", "--network=none", "--user=0", f"--volume={PROJECT}_trainer-state:/state",
           "--entrypoint=sed", IMAGE, "-i", "s/1234/12/", "/state/audit.jsonl")  # fmt: skip


def test_a_hospitals_ten_minutes(tmp_path: Path, removed: None) -> None:  # noqa: ARG001
    gateway = find_host()
    port = find_free_port()
    address = f"{gateway}:{port}"
    certs, kits = tmp_path / "out", tmp_path / "kits"
    make_all(certs, ["b"], [gateway])
    (tmp_path / "centre").mkdir()
    with superlink(certs, tmp_path / "centre", port) as control:
        archive = build_kit(certs, SITE, address, read_image(IMAGE), kits)
        site = Site(unpack(archive, tmp_path) / "site")
        assert "signature: good" in site("verify", fingerprint_key(open_kit_key(certs)))
        assert "answers with a certificate of the coordinator" in site("preflight")

        home = tmp_path / "home"
        said = site("init", home)
        fingerprint = re.search(r"^fingerprint: (\S+)$", said, re.MULTILINE)
        assert fingerprint, said
        site = Site(home / "site")
        status, said = site.call("up")
        assert (status, "take up the coordinator's reply first" in said) == (1, True)

        reply = sign(certs, home / f"request-{SITE}.tar", fingerprint[1])
        status, said = site.call("accept", archive)
        assert status == 1, "not a reply"
        assert "accepted" in site("accept", reply)

        enrol(certs, control)
        (home / "data" / "records.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        said = site("preflight")
        for line in (
            "records: 2, patients: 2",
            "keys: readable for user 10001 alone",
            "clocks agree",
        ):
            assert re.search(rf"^ok +.*{line}", said, re.MULTILINE), said

        assert "ledger of privacy spent: made" in site("up")
        assert "ledger" not in site("up"), "it is made once"
        said = site("status")
        assert "connected: yes" in said
        assert "privacy spent: nothing yet" in said
        assert "last round: none yet" in said
        assert re.search(r"certificate: 8\d days left", said)

        append_round()
        assert "2 lines fit their chain" in site("audit", "verify"), "it was started, and trained"
        said = site("status")
        assert "last round: round 1 of run icd10" in said
        assert "bytes sent: 1234 in 1 updates" in said

        upgrade_breaks_and_is_rolled_back(certs, address, kits, site, home)

        site("stop")
        status, said = site.call("status")
        assert status == 1
        assert "connected: no (exited)" in said
        edit_audit_log()
        status, said = site.call("audit", "verify")
        assert (status, "does not fit its chain at line 2" in said) == (1, True)
        assert not list((home / "releases").rglob("*.key")), "keys lie outside the releases"


def upgrade_breaks_and_is_rolled_back(
    certs: Path, address: str, kits: Path, site: Site, home: Path
) -> None:
    """A release that never becomes healthy, correctly signed."""
    break_image()
    new = build_kit(certs, SITE, address, read_image(BROKEN), kits, release="0.2.0")
    trained = docker("inspect", "--format", "{{.Image}}", f"{PROJECT}-trainer-1")
    status, said = site.call("upgrade", new)
    assert status == 1
    assert "Release 0.2.0 did not become healthy: rolled back to 0.1.0, which is healthy" in said
    assert os.readlink(home / "current") == "releases/0.1.0"
    assert docker("inspect", "--format", "{{.Image}}", f"{PROJECT}-trainer-1") == trained
    said = site("status")
    assert "release 0.1.0" in said
    assert "connected: yes" in said
    assert "last round: round 1 of run icd10" in said, "the state outlives releases"


def sign(certs: Path, request: Path, fingerprint: str) -> Path:
    """The coordinator's answer to a request, after both sides compared the fingerprint."""
    command = [sys.executable, "-m", "certs", "sign", "--out", certs, "--request", request]
    done = subprocess.run(
        [*command, "--fingerprint", fingerprint],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"^reply: (.+)$", done.stdout, re.MULTILINE)
    assert found
    return Path(found[1])


def enrol(certs: Path, control: str) -> None:
    """Registers the SuperNode keys of the roster."""
    command = [sys.executable, "-m", "server", "enrol", "--control", control]
    command += ["--root-certificates", str(certs / "superlink" / "current" / "root.crt")]
    done = subprocess.run(
        [*command, "--coordinator", str(certs / "coordinator")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert SITE in done.stdout
