"""The coordinator's commands on a federation that works, and a site that they leave behind."""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc.experimental import session_cache

from certs.authority import issue_site, read_authority
from certs.files import CertificateError, encode_certificates, encode_key, read_tls_key
from certs.handshake import serve_serial
from certs.rollover import STAGES, read_stage
from demo.processes import LocalFederation, LocalSite
from fedqlora.address import find_free_port, split_address
from fedqlora.credentials import NOT_ADMITTED
from fedqlora.errors import FederationError
from server.enrolment import LEAVE_SECONDS
from tests.launchers.conftest import REPOSITORY, make_certs
from tests.launchers.test_admission import ADMITTED, call
from tests.launchers.test_renewal import start_rounds, wait_for, wait_until_presented

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certs(tmp_path_factory.mktemp("lifecycle") / "out", "a,b,c")


@pytest.fixture(scope="module")
def working(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    """A federation of a, b and c."""
    folder = tmp_path_factory.mktemp("lifecycle-federation")
    sites = [LocalSite(name=name) for name in ("a", "b", "c")]
    with LocalFederation(
        certs=keys, folder=folder / "logs", runs=folder / "runs", sites=sites
    ) as running:
        yield running


@pytest.fixture
def carry_out(
    working: LocalFederation, keys: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command as `make ... CONNECT= CONTROL=` does."""

    def start(command: str, *more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "demo.lifecycle", command, "--out", str(keys), *more]
        line += ["--connect", working.fleet_address, "--control", working.control_address]
        return subprocess.run(
            line, cwd=REPOSITORY, capture_output=True, text=True, timeout=180, check=False
        )

    return start


Command = Callable[..., subprocess.CompletedProcess[str]]


def test_a_rotation_says_what_is_served_that_the_run_goes_on_and_who_is_online(
    working: LocalFederation, keys: Path, echo_app: Path, carry_out: Command
) -> None:
    run_id = start_rounds(working, echo_app, 6)
    said = carry_out("rotate")
    assert said.returncode == 0, said
    live = serve_serial(
        split_address(working.fleet_address, ""), keys / "superlink" / "current" / "root.crt"
    )
    assert said.stdout.splitlines()[-3:] == [
        f"live: {working.fleet_address} serves serial {live}",
        f"run {run_id}: still going",
        "online: a, b, c",
    ]
    wait_until_presented(working, keys, "abc")
    assert working.wait_for_run(run_id, timeout_seconds=180).completed


def interrupt_stage(keys: Path, write: int = 30) -> None:
    """Kills the next stage of the rollover at one of its writes."""
    program = (
        "import sys, pathlib; from certs.rollover import roll_over;"
        "from tests.certs.interrupted import interrupt;"
        f"sys.exit(interrupt(lambda: roll_over(pathlib.Path({str(keys)!r})), {write}, 'kill'))"
    )
    killed = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False)
    assert killed.returncode == 42


def test_a_site_that_knows_only_the_old_root_stays_through_interrupted_stages_until_it_is_retired(
    working: LocalFederation,
    keys: Path,
    echo_app: Path,
    carry_out: Command,
    tmp_path: Path,
) -> None:
    forgotten = Path(shutil.copytree(keys / "sites" / "a" / "current", tmp_path / "forgotten"))
    fleet = split_address(working.fleet_address, "")
    old_root = forgotten / "ca.crt"
    for stage in STAGES:
        assert read_stage(keys) == stage
        interrupt_stage(keys)
        if stage != "retire":
            assert serve_serial(fleet, old_root, forgotten)
        said = carry_out("rollover", "--json")
        assert said.returncode == 0, said
        content = json.loads(said.stdout)
        assert (content["stage"]["name"], content["online"]) == (stage, ["a", "b", "c"])
        wait_until_presented(working, keys, "abc")
        if stage != "retire":
            assert serve_serial(fleet, old_root, forgotten) == content["live"]
    with pytest.raises(CertificateError):
        serve_serial(fleet, old_root, forgotten)
    result = working.run(echo_app, {"rounds": 1}, timeout_seconds=180)
    assert "answers ['a.sock0', 'b.sock0', 'c.sock0']" in result.log
    assert "Refusing" not in working.read_log("superlink")


def test_a_serverapp_that_trusts_the_old_root_is_served_until_the_leaf_goes(
    working: LocalFederation, keys: Path, carry_out: Command, tmp_path: Path
) -> None:
    old_root = tmp_path / "root.crt"
    shutil.copy(keys / "superlink" / "current" / "root.crt", old_root)
    for _ in STAGES:
        assert carry_out("rollover").returncode == 0
        wait_until_presented(working, keys, "abc")
    control = split_address(working.control_address, "")
    assert serve_serial(control, old_root)
    with pytest.raises(CertificateError, match="refuses"):
        serve_serial(split_address(working.fleet_address, ""), old_root)
    assert carry_out("rotate").returncode == 0
    with pytest.raises(CertificateError, match="refuses"):
        serve_serial(control, old_root)
    wait_until_presented(working, keys, "abc")


@pytest.mark.parametrize("case", ["expired", "not yet valid", "of the server authority", "absent"])
def test_the_superlink_completes_no_handshake_with_a_certificate_that_will_not_do(
    working: LocalFederation, keys: Path, tmp_path: Path, case: str
) -> None:
    present = keys / "sites" / "a" / "current"
    fleet = split_address(working.fleet_address, "")
    assert serve_serial(fleet, present / "ca.crt", present)
    authority = read_authority(keys / "authority")
    issuer = authority.server if case == "of the server authority" else authority.sites
    days = {"expired": -91, "not yet valid": 2}.get(case, 0)
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    key = read_tls_key(present / "client.key")
    leaf = issue_site(issuer, key.public_key(), "a", moment)
    (tmp_path / "client.key").write_bytes(encode_key(key))
    (tmp_path / "client.crt").write_bytes(encode_certificates(leaf, issuer.certificate))
    if case == "absent":
        root, private = (present / "ca.crt").read_bytes(), None
        with (
            grpc.secure_channel(
                working.fleet_address, grpc.ssl_channel_credentials(root, private)
            ) as channel,
            pytest.raises(grpc.FutureTimeoutError),
        ):
            grpc.channel_ready_future(channel).result(timeout=5.0)
        return
    with pytest.raises(CertificateError):
        serve_serial(fleet, present / "ca.crt", tmp_path)


def test_a_certificate_that_names_another_site_admits_nobody(
    working: LocalFederation, keys: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(keys / "sites" / "a" / "current", tmp_path / "keys"))
    authority = read_authority(keys / "authority")
    key = read_tls_key(folder / "client.key")
    leaf = issue_site(authority.sites, key.public_key(), "b", datetime.datetime.now(datetime.UTC))
    (folder / "client.crt").write_bytes(encode_certificates(leaf, authority.sites.certificate))
    line = [sys.executable, "-m", "client.supernode", "--keys", str(folder)]
    line += ["--superlink", working.fleet_address, "--state", str(tmp_path / "state")]
    line += ["--handover", str(tmp_path / "handover"), "--wait-seconds", "1"]
    line += ["--clientapp-api", f"127.0.0.1:{find_free_port()}"]
    said = subprocess.run(
        line, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert said.returncode != 0
    assert "does not admit this site" in said.stderr.splitlines()[-1]


def connect(
    working: LocalFederation, keys: Path, site: str, cache: session_cache.SSLSessionCache
) -> grpc.Channel:
    """A new connection to the real SuperLink, resumed from the cache where that is possible."""
    folder = keys / "sites" / site / "current"
    root, key, chain = (
        (folder / name).read_bytes() for name in ("ca.crt", "client.key", "client.crt")
    )
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_session_cache", cache)]
    credentials = grpc.ssl_channel_credentials(root, key, chain)
    return grpc.secure_channel(working.fleet_address, credentials, options)


def test_one_command_revokes_a_site_in_mid_session_and_says_when_it_left(
    working: LocalFederation, keys: Path, echo_app: Path, carry_out: Command
) -> None:
    run_id = start_rounds(working, echo_app, 30)
    cache = session_cache.ssl_session_cache_lru(4)
    before = connect(working, keys, "b", cache)
    # Flower's own check comes after ours: the heartbeat names no node.
    passed = call(before, keys, "b")
    assert passed not in (ADMITTED, NOT_ADMITTED)
    said = carry_out("revoke", "--site", "b")
    assert said.returncode == 0, said
    # The SuperLink looks at its folder every two seconds.
    wait_for(lambda: call(before, keys, "b") == NOT_ADMITTED, LEAVE_SECONDS)
    before.close()
    resumed = connect(working, keys, "b", cache)
    assert call(resumed, keys, "b") == NOT_ADMITTED
    resumed.close()
    lines = said.stdout.splitlines()
    assert lines[0].startswith("site b: revoked, ")
    assert "its key is burned" in lines[-4]
    assert lines[-3:] == ["still online: a, c", f"run {run_id}: still going", "online: a, c"]
    wait_for(lambda: "does not admit this site" in working.read_log("supernode-b"), LEAVE_SECONDS)
    wait_for(lambda: not working.running("supernode-b"), LEAVE_SECONDS)
    with working.control() as control:
        control.stop_run(run_id)
        with pytest.raises(FederationError, match="unregistered before"):
            control.register(keys / "sites" / "b" / "current" / "supernode.pub", "b")
    again = json.loads(carry_out("revoke", "--site", "b", "--json").stdout)
    assert again["revocation"]["anew"] is False
    assert again["eviction"] == ["site b: no SuperNode of it is registered"]


def test_a_superlink_that_does_not_answer_is_named_before_anything_changes(
    working: LocalFederation, keys: Path
) -> None:
    before = (keys / "superlink" / "current").readlink()
    nobody = f"127.0.0.1:{find_free_port()}"
    line = [sys.executable, "-m", "demo.lifecycle", "rotate", "--out", str(keys), "--json"]
    line += ["--connect", working.fleet_address, "--control", nobody, "--patience-seconds", "0"]
    said = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert nobody in json.loads(said.stdout)["error"]
    assert (keys / "superlink" / "current").readlink() == before
