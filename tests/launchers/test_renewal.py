"""Certificates that change while a federation works: no round lost, and revoked sites gone."""

from __future__ import annotations

import datetime
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from certs.files import read_tls_key
from certs.revocation import revoke
from certs.rollover import STAGES, roll_over
from certs.rotation import rotate as rotate_all
from client.renewal import RETRY_SECONDS, Renewal, is_due
from demo.processes import LocalFederation, LocalSite
from fedqlora.channel import ReplaceableChannel
from fedqlora.credentials import ClientCertificate, ReloadingIdentity
from fedqlora.tls import Identity, load_identity
from tests.launchers.conftest import REPOSITORY, make_certs
from tests.launchers.members import make_leaf, rotate


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for a condition; fails when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


class Echo(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """A server that answers with its name, the slow method only when it is let go."""

    def __init__(self, name: str) -> None:
        self.go = threading.Event()
        self.began = threading.Event()
        self._name = name.encode()
        pool = ThreadPoolExecutor()
        self.server = grpc.server(pool)
        self.server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:  # type: ignore[type-arg]
        return grpc.unary_unary_rpc_method_handler(
            lambda _request, _context: self._answer(handler_call_details.method)
        )

    def _answer(self, method: str) -> bytes:
        if method == "/slow":
            self.began.set()
            assert self.go.wait(20.0)
        return self._name


@pytest.fixture
def servers() -> Iterator[tuple[Echo, Echo]]:
    pair = Echo("old"), Echo("new")
    yield pair
    for one in pair:
        one.server.stop(grace=None).wait()


def test_calls_under_way_end_on_the_old_connection_and_later_ones_use_the_new(
    servers: tuple[Echo, Echo],
) -> None:
    old, new = servers
    first = grpc.insecure_channel(old.address)
    channel = ReplaceableChannel(first)
    fast = channel.unary_unary("/fast", None, None)
    slow = channel.unary_unary("/slow", None, None)
    assert fast(b"", timeout=20.0) == b"old"
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(slow, b"", timeout=20.0)
        assert old.began.wait(20.0)
        channel.replace(grpc.insecure_channel(new.address))
        assert fast.with_call(b"", timeout=20.0)[0] == b"new"
        old.go.set()
        assert answer.result() == b"old"
    with pytest.raises(ValueError, match="closed channel"):
        first.unary_unary("/fast")(b"")
    assert fast(b"", timeout=20.0) == b"new"
    channel.close()


def test_an_idle_connection_is_closed_when_it_is_replaced(servers: tuple[Echo, Echo]) -> None:
    first = grpc.insecure_channel(servers[0].address)
    with ReplaceableChannel(first) as channel:
        channel.replace(grpc.insecure_channel(servers[1].address))
        with pytest.raises(ValueError, match="closed channel"):
            first.unary_unary("/fast")(b"")


@pytest.fixture
def folder(certs: Path, tmp_path: Path) -> Path:
    """Key folder of site a, to be changed by a test."""
    return shutil.copytree(certs / "sites" / "a", tmp_path / "a", symlinks=True)


class Answers:
    """A SuperLink that accepts new connections or not."""

    def __init__(self) -> None:
        self.accepting = True
        self.asked = 0

    def __call__(self, _channel: grpc.Channel) -> bool:
        self.asked += 1
        return self.accepting


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def presented(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClientCertificate]:
    """What a SuperNode presents once its channel is made; nobody serves at its address."""
    monkeypatch.setattr(grpc, "secure_channel", grpc.secure_channel)
    certificate = ClientCertificate(load_identity(folder, "client"))
    certificate.install()
    with grpc.secure_channel("localhost:1", grpc.ssl_channel_credentials()):
        yield certificate


def renew(certs: Path, folder: Path, age_days: float = 0) -> Identity:
    key = read_tls_key(folder / "current" / "client.key")
    rotate(folder, {"client.crt": make_leaf(certs, "a", key, age_days)})
    return load_identity(folder, "client")


def follow(folder: Path, presented: ClientCertificate, answers: Answers) -> Renewal:
    identities = ReloadingIdentity(folder, "client")
    presented.identity = identities.follow()
    return Renewal(identities, presented, answers)


def test_a_new_certificate_is_presented_once_the_superlink_has_accepted_it(
    certs: Path, folder: Path, presented: ClientCertificate, answers: Answers
) -> None:
    renewal = follow(folder, presented, answers)
    renewal.look(0.0)
    assert answers.asked == 0
    new = renew(certs, folder)
    renewal.look(1.0)
    renewal.look(2.0)
    assert (presented.identity.serial, answers.asked) == (new.serial, 1)


def test_one_that_the_superlink_does_not_accept_is_tried_again_and_logged_once(
    certs: Path,
    folder: Path,
    presented: ClientCertificate,
    answers: Answers,
    caplog: pytest.LogCaptureFixture,
) -> None:
    renewal, old = follow(folder, presented, answers), presented.identity.serial
    new = renew(certs, folder)
    answers.accepting = False
    for moment in (0.0, 1.0, RETRY_SECONDS + 1):
        renewal.look(moment)
    assert (presented.identity.serial, answers.asked) == (old, 2)
    assert len([one for one in caplog.messages if "does not accept" in one]) == 1
    answers.accepting = True
    renewal.look(2 * RETRY_SECONDS + 2)
    assert presented.identity.serial == new.serial


@pytest.mark.parametrize("name", ["client.crt", "client.key", "ca.crt"])
def test_a_garbage_file_is_never_presented_and_shows_as_a_problem(
    folder: Path, presented: ClientCertificate, answers: Answers, name: str
) -> None:
    identities = ReloadingIdentity(folder, "client")
    old = presented.identity = identities.follow()
    renewal = Renewal(identities, presented, answers)
    assert identities.problem is None
    good = (folder / "current" / name).read_bytes()
    rotate(folder, {name: b"garbage"})
    renewal.look(0.0)
    assert (presented.identity, answers.asked) == (old, 0)
    assert name in str(identities.problem)
    rotate(folder, {name: good})
    renewal.look(1.0)
    assert identities.problem is None
    assert answers.asked == 1


def test_a_renewal_is_due_after_two_thirds_of_the_lifetime(certs: Path, folder: Path) -> None:
    identity = renew(certs, folder)
    start, end = identity.leaf.not_valid_before_utc, identity.leaf.not_valid_after_utc
    second = datetime.timedelta(seconds=1)
    assert not is_due(identity, start + (end - start) * 2 / 3 - second)
    assert is_due(identity, start + (end - start) * 2 / 3 + second)


def test_a_due_renewal_is_said_once_a_day(
    certs: Path,
    folder: Path,
    presented: ClientCertificate,
    answers: Answers,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    renew(certs, folder, age_days=61)
    renewal = follow(folder, presented, answers)
    for moment in (0.0, 60.0, 86401.0):
        renewal.look(moment)
    assert len([one for one in caplog.messages if "two thirds" in one]) == 2
    renew(certs, folder)
    renewal.look(2 * 86402.0)
    assert len([one for one in caplog.messages if "two thirds" in one]) == 2


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of a federation whose members change."""
    return make_certs(tmp_path_factory.mktemp("changing") / "out", "a,b,c")


@pytest.fixture(scope="module")
def changing(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFederation]:
    """A federation of a, b and c."""
    folder = tmp_path_factory.mktemp("changing-federation")
    sites = [LocalSite(name=name) for name in ("a", "b", "c")]
    with LocalFederation(
        certs=keys, folder=folder / "logs", runs=folder / "runs", sites=sites
    ) as running:
        yield running


def wait_for_line(changing: LocalFederation, name: str, text: str, seconds: float = 60.0) -> None:
    """Waits until a process has logged a text."""
    wait_for(lambda: text in changing.read_log(name), seconds)


def wait_until_presented(changing: LocalFederation, keys: Path, sites: str) -> None:
    """Waits until each of these sites presents the certificate that lies in its folder."""
    for site in sites:
        serial = load_identity(keys / "sites" / site, "client").serial
        line = f"Presenting the certificate with serial {serial}"
        wait_for_line(changing, f"supernode-{site}", line)


def check_run(changing: LocalFederation, run_id: int, rounds: int, sites: str) -> None:
    """Waits for the end of a run: every site answered in every round."""
    result = changing.wait_for_run(run_id, timeout_seconds=300)
    assert result.completed, result
    assert re.findall(r"round \d+ answers .*", result.log) == [
        f"round {number} answers {[f'{site}.sock{number}' for site in sites]}"
        for number in range(rounds)
    ]


def start_rounds(changing: LocalFederation, app: Path, rounds: int) -> int:
    """Starts a run and returns its id once site a has answered in it."""
    before = changing.read_log("supernode-a").count("Sent successfully")
    run_id = changing.start_run(app, {"rounds": rounds})
    wait_for(lambda: changing.read_log("supernode-a").count("Sent successfully") > before)
    return run_id


@pytest.mark.slow
def test_no_round_is_lost_while_every_certificate_is_replaced_twice(
    changing: LocalFederation, keys: Path, echo_app: Path
) -> None:
    processes = changing.process_ids()
    run_id = start_rounds(changing, echo_app, 8)
    # The second rotation revokes what the first replaced: who still used it would be refused.
    for _ in range(2):
        rotate_all(keys)
        wait_until_presented(changing, keys, "abc")
    assert is_active(changing, run_id)
    check_run(changing, run_id, 8, "abc")
    assert changing.process_ids() == processes
    assert "Refusing" not in changing.read_log("superlink")


@pytest.mark.slow
def test_every_site_stays_while_the_authority_is_replaced(
    changing: LocalFederation, keys: Path, echo_app: Path
) -> None:
    processes = changing.process_ids()
    for stage in STAGES:
        assert roll_over(keys).name == stage
        wait_until_presented(changing, keys, "abc")
    check_run(changing, changing.start_run(echo_app, {"rounds": 2}), 2, "abc")
    for site in ("a", "b", "c"):
        assert changing.process_ids()[f"supernode-{site}"] == processes[f"supernode-{site}"]
    assert "Refusing" not in changing.read_log("superlink")


def is_active(changing: LocalFederation, run_id: int) -> bool:
    with changing.control() as control:
        run = control.read_run(run_id)
    return run is not None and run.active


@pytest.mark.slow
def test_a_garbage_certificate_in_mid_round_costs_nothing(
    changing: LocalFederation, keys: Path, echo_app: Path
) -> None:
    run_id = start_rounds(changing, echo_app, 3)
    folder = keys / "sites" / "a"
    good = (folder / "current" / "client.crt").read_bytes()
    rotate(folder, {"client.crt": b"garbage"})
    wait_for_line(changing, "supernode-a", "the new one is bad")
    result = changing.wait_for_run(run_id, timeout_seconds=180)
    assert result.completed, result
    assert len(re.findall(r"round \d+ answers \['a.sock", result.log)) == 3
    rotate(folder, {"client.crt": good})


@pytest.mark.slow
def test_a_garbage_certificate_of_the_superlink_is_named_though_nobody_dials(
    changing: LocalFederation, keys: Path
) -> None:
    folder = keys / "superlink"
    good = (folder / "current" / "server.crt").read_bytes()
    rotate(folder, {"server.crt": b"garbage"})
    wait_for_line(changing, "superlink", "the new one is bad")
    rotate(folder, {"server.crt": good})


@pytest.mark.slow
def test_a_revoked_site_loses_its_session_at_once_and_is_told_why(
    changing: LocalFederation, keys: Path, echo_app: Path
) -> None:
    revoke(keys, "b")
    wait_for(lambda: not changing.running("supernode-b"))
    wait_for_line(changing, "supernode-b", "does not admit this site")
    assert "Refusing the calls of site b" in changing.read_log("superlink")
    said = evict(changing, keys, "b")
    assert said.returncode == 0, said
    first, second = said.stdout.splitlines()
    assert re.fullmatch(r"site b: .* since .* UTC, its key is burned", first)
    assert second == "still online: a, c"
    result = changing.run(echo_app, {"rounds": 1}, timeout_seconds=120)
    assert "answers ['a.sock0', 'c.sock0']" in result.log


@pytest.mark.slow
def test_an_evicted_site_leaves_while_the_others_stay(
    changing: LocalFederation, keys: Path
) -> None:
    said = evict(changing, keys, "c")
    assert (said.returncode, said.stderr) == (0, "")
    assert re.match(r"site c: offline since", said.stdout)
    assert said.stdout.endswith("\nstill online: a\n")
    wait_for_line(changing, "supernode-c", "does not know the key", 150)
    again = evict(changing, keys, "c")
    assert again.returncode == 1
    assert "No SuperNode of site c is registered" in again.stderr


def evict(changing: LocalFederation, keys: Path, site: str) -> subprocess.CompletedProcess[str]:
    """The coordinator's command."""
    return subprocess.run(
        [sys.executable, "-m", "server", "evict", site],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "FEDQLORA_CONTROL": changing.control_address,
            "FEDQLORA_ROOT_CERTIFICATES": str(keys / "superlink" / "current" / "root.crt"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
