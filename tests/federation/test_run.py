"""A whole run, and what it leaves behind."""

from __future__ import annotations

import json

import grpc
import pytest

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import rank_of
from fedqlora.envelope import sign
from fedqlora.keys import load_signing_key
from fedqlora.protocol_pb2_grpc import TrainerStub
from server.metrics import Metrics
from server.rescore import rescore
from tests.federation.conftest import Hospitals

pytestmark = pytest.mark.slow


def test_a_run_of_real_processes_learns_and_leaves_a_whole_run_folder(
    hospitals: Hospitals,
) -> None:
    folder = hospitals.new_run(rounds=2, steps=20)
    result = hospitals.run(folder)
    assert result.completed, folder.status()
    lines = Metrics(folder.path / "metrics.jsonl").read()
    scores = {
        line["round"]: line["scores"]["all"] for line in lines if line["event"] == "evaluation"
    }
    assert set(scores) == {0, 1, 2}
    assert scores[2]["loss"] < scores[0]["loss"]
    assert hospitals.outcomes(folder, 2) == {"a": "used", "b": "used"}
    # exact_svd, the default: two sites at rank 4 leave a residual of rank 4, which goes down.
    newest = folder.latest()
    assert newest is not None
    assert rank_of(newest.residual) > 0
    down = {r: hospitals.sites(folder, r)[0]["bytes_down"] for r in (1, 2)}
    assert down[2] > 1.8 * down[1]
    rounds = [line for line in lines if line["event"] == "round"]
    assert rounds[0]["residual_norm"] > 0
    exported = json.loads((folder.path / "adapter" / "adapter_config.json").read_text())
    assert exported["r"] == 4 + rank_of(newest.residual)
    names = {path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*")}
    assert {
        "config.json",
        "versions.json",
        "metrics.jsonl",
        "rounds/0002/adapter.safetensors",
        "rounds/0002/state.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    } <= names
    assert folder.status() == {"status": "finished", "round": 2}
    # Scored again from the folder, it is what the run has said.
    models, held_out = hospitals.scratch / "models", hospitals.scratch / "held-out"
    table = rescore(folder, held_out, models)
    for name, round_ in (("untuned base", 0), ("federated", 2)):
        (row,) = (line for line in table.splitlines() if line.startswith(f"| {name}"))
        assert f"{scores[round_]['loss']:.3f}" in row


def send(hospitals: Hospitals, site: str, envelope: bytes) -> pb.Refusal:
    """Put an envelope on a site's socket, as hostile app code could, and expect a refusal."""
    socket = hospitals.federation.socket_of(f"trainer-{site}")
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        reply = TrainerStub(channel).Exchange(pb.Envelope.FromString(envelope))
    assert pb.Header.FromString(reply.header).kind == pb.REFUSAL
    return pb.Refusal.FromString(reply.payload)


def instruction(hospitals: Hospitals, signer: str, **fields: object) -> bytes:
    key = load_signing_key(hospitals.certs / signer / "signing.key")
    values = {"run": "r", "round_": 1, "site": "a", "kind": pb.TRAIN, "issued": 5, "payload": b""}
    return sign(key, **{**values, **fields})


def test_a_trainer_obeys_the_coordinators_key_only(hospitals: Hospitals) -> None:
    refusal = send(hospitals, "a", instruction(hospitals, "evaluator"))
    assert refusal.code == "SignatureError"


def test_a_trainer_refuses_what_is_addressed_to_another_site(hospitals: Hospitals) -> None:
    refusal = send(hospitals, "a", instruction(hospitals, "coordinator", site="b"))
    assert refusal.code == "SignatureError"


def test_a_trainer_names_the_version_that_it_does_not_speak(hospitals: Hospitals) -> None:
    refusal = send(hospitals, "a", instruction(hospitals, "coordinator", version=9))
    assert refusal.code == "VersionError"
    assert "version 9" in refusal.sentence


def test_an_older_instruction_is_refused_also_after_the_trainer_restarts(
    hospitals: Hospitals,
) -> None:
    run = {"run": "replayed"}
    old = instruction(hospitals, "coordinator", issued=1, **run)
    new = instruction(hospitals, "coordinator", issued=2, **run)
    # Both are refused for their empty payload, but only after the window has seen them.
    assert send(hospitals, "a", old).code == "ConfigError"
    assert send(hospitals, "a", new).code == "ConfigError"
    assert send(hospitals, "a", old).code == "ReplayError"
    hospitals.federation.restart("trainer-a")
    assert send(hospitals, "a", old).code == "ReplayError"


def test_an_instruction_against_the_policy_names_the_rule_and_ends_the_run(
    hospitals: Hospitals,
) -> None:
    folder = hospitals.new_run(rounds=10)
    folder.set_status("new")
    result = hospitals.run(folder)
    assert not result.completed
    error = folder.status()["error"]
    assert "limits.rounds" in error
    assert "site" in error or "a:" in error
    log = (hospitals.scratch / "processes" / "trainer-a" / "audit.jsonl").read_text()
    refused = [json.loads(line) for line in log.splitlines() if folder.name in line]
    assert [line["event"] for line in refused] == ["refused"]
    assert refused[0]["rule"] == "limits.rounds"
