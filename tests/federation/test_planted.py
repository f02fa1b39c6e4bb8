"""Records are in the site's folder only: planted, then looked for in all that runs leave behind."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedqlora import protocol_pb2 as pb
from fedqlora import protocol_pb2_grpc
from fedqlora.engine.service import SAYABLE, Identity, Service
from server.report import write_report
from tests.client.test_worker import COORDINATOR, SITE, ask, run_config
from tests.federation.conftest import SITES, Hospitals, running_hospitals
from tests.federation.planted import MARKS, Find, encode_mark, plant, read_files, search

pytestmark = pytest.mark.slow

LOUD = {
    "GRPC_VERBOSITY": "debug",
    "FLWR_LOG_LEVEL": "DEBUG",
    "TRANSFORMERS_VERBOSITY": "debug",
    "DATASETS_VERBOSITY": "debug",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONWARNINGS": "always",
}


def test_the_search_finds_every_mark_in_every_encoding(tmp_path: Path) -> None:
    for mark, text in MARKS.items():
        for number, (encoding, pattern) in enumerate(encode_mark(text).items()):
            path = tmp_path / f"{mark}-{number}"
            path.write_bytes(b"before" + pattern + b"after")
            assert Find(str(path), mark, encoding) in search(read_files(tmp_path))
    plant(tmp_path)
    found = search({"records": (tmp_path / "planted.jsonl").read_bytes()})
    assert {one.mark for one in found} == set(MARKS)


@dataclass
class Recorder(protocol_pb2_grpc.TrainerServicer):
    """Stands on a trainer's socket and keeps every byte that leaves it."""

    trainer: Path
    replies: list[bytes] = field(default_factory=list)

    def Exchange(self, request: Any, context: Any) -> Any:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(f"unix:{self.trainer}", options=options) as channel:
            try:
                reply = protocol_pb2_grpc.TrainerStub(channel).Exchange(request)
            except grpc.RpcError as error:
                self.replies.append(str(error.details()).encode())
                context.abort(grpc.StatusCode.UNAVAILABLE, "the trainer is away")
        self.replies.append(reply.SerializeToString())
        return reply


@contextlib.contextmanager
def recording(hospitals: Hospitals, site: str) -> Iterator[Recorder]:
    """Put a recorder between a site's trainer and its clientapp."""
    socket = hospitals.federation.socket_of(f"trainer-{site}")
    behind = socket.with_suffix(".real")
    socket.rename(behind)
    recorder = Recorder(behind)
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(max_workers=4), options=unlimited)
    protocol_pb2_grpc.add_TrainerServicer_to_server(recorder, server)
    checks = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    checks.set("", health_pb2.HealthCheckResponse.SERVING)
    try:
        yield recorder
    finally:
        server.stop(grace=1).wait()
        behind.rename(socket)


def test_a_run_with_failures_and_debug_logs_leaves_no_record_outside_the_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name, value in {**LOUD, "HOME": str(home), "TMPDIR": "/tmp"}.items():  # noqa: S108
        monkeypatch.setenv(name, value)
    folder = tmp_path / "federation"
    replies: list[bytes] = []
    with running_hospitals(folder) as hospitals:
        scratch = hospitals.federation.socket_of("trainer-a").parent
        # Trainers read their records at the first instruction of a run.
        for site in SITES:
            plant(folder / "data" / site)

        # A whole run, its ServerApp killed in the middle and resumed.
        run = hospitals.new_run(rounds=2, steps=100, method="fedavg", update="float32")
        with recording(hospitals, "b") as recorder:
            hospitals.start(run)
            hospitals.wait_until_training(run, 1, "b")
            assert hospitals.federation.kill_serverapp()
            assert hospitals.run(run).completed, run.status()
            replies += recorder.replies
        write_report(run)

        # A trainer that crashes while it trains, as by a fault in a library, and starts again.
        crashed = hospitals.new_run(rounds=1, steps=100, method="fedavg")
        number = hospitals.start(crashed)
        hospitals.wait_until_training(crashed, 1, "a")
        trainer = hospitals.federation.process_ids()["trainer-a"]
        os.kill(trainer, signal.SIGABRT)
        deadline = time.monotonic() + 30
        while hospitals.federation.running("trainer-a"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        hospitals.federation.start_process("trainer-a")
        assert hospitals.wait(number).completed, crashed.status()

        # A run that the policy forbids, and one over a row that is no record.
        assert not hospitals.run(hospitals.new_run(rounds=10)).completed
        bad = {"prompt": MARKS["prompt"], "completion": [MARKS["completion"]]}
        with (folder / "data" / "a" / "planted.jsonl").open("a") as file:
            file.write(json.dumps(bad) + "\n" + MARKS["words"] + "\n")
        with recording(hospitals, "a") as recorder:
            broken = hospitals.new_run(rounds=1, method="fedavg")
            assert not hospitals.run(broken).completed
            replies += recorder.replies

        left = {f"reply {index}": reply for index, reply in enumerate(replies)}
        kinds = {pb.Header.FromString(pb.Envelope.FromString(r).header).kind for r in replies}
        assert {pb.DESCRIPTION, pb.UPDATE, pb.REFUSAL} <= kinds
        everything = read_files(folder, scratch, home) | left
    log = (folder / "processes" / "trainer-a.log").read_text()
    assert "planted.jsonl" in log  # the fault was met, and told by its place
    own = str(folder / "data")
    inside = {path: data for path, data in everything.items() if path.startswith(own)}
    outside = {path: data for path, data in everything.items() if path not in inside}
    assert {one.mark for one in search(inside)} == set(MARKS)
    assert any(path.endswith(("-wal", ".db")) or "sqlite" in path for path in outside)
    assert any(path.endswith("report.html") for path in outside)
    assert not [path for path in outside if Path(path).name.startswith("core")]
    assert list(search(outside)) == []


class QuotingWorker:
    """Fails as a library does that quotes what it was given."""

    def perform(self, *_: object) -> Any:
        raise ValueError(f"cannot parse {MARKS['prompt']!r}")

    def refused(self, *_: object) -> None:
        pass


def test_an_error_that_quotes_a_record_is_neither_sent_nor_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    identity = Identity(name="a", key=SITE, coordinator=COORDINATOR.public_key())
    asked = pb.Describe(config=run_config().model_dump_json())

    # Without the rule, the sentence leaves as it is.
    open_service = Service(identity, tmp_path / "1", QuotingWorker(), (Exception,))  # type: ignore[arg-type]
    said = ask(open_service, pb.DESCRIBE, asked, 1)
    assert list(search({"reply": said.SerializeToString()}))

    caplog.set_level(logging.DEBUG)
    service = Service(identity, tmp_path / "2", QuotingWorker(), SAYABLE)
    refusal = ask(service, pb.DESCRIBE, asked, 1)
    assert refusal.code == "InternalError"
    pieces = {"reply": refusal.SerializeToString(), "log": caplog.text.encode()}
    assert list(search(pieces)) == []
    # What it takes to find the fault is there.
    assert "builtins.ValueError" in caplog.text
    assert "in perform" in caplog.text
