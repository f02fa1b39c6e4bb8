"""The trainer behind its service: what it opens, what it sends, what it does twice."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.budget import Budget
from client.policy import Limits, Metrics, Models, Policy
from client.trainer import Trainer
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import AdapterSpec, check_update, initial_adapter
from fedqlora.audit import AuditLog, verify
from fedqlora.codec import decode, encode
from fedqlora.config import RunConfig, validate
from fedqlora.engine.base import base_digest
from fedqlora.engine.model import BaseModel
from fedqlora.engine.service import Identity, Service
from fedqlora.envelope import instruction_digest, sign, verify_reply
from tests.tiny_models import save_llama, save_t5

COORDINATOR = Ed25519PrivateKey.from_private_bytes(b"c" * 32)
SITE = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
MARK = "w7 w8 w9"


@dataclass
class Site:
    """A hospital's folders, and its service as a restart would build it."""

    folder: Path
    policy: Policy

    def service(self) -> Service:
        trainer = Trainer(
            site="a",
            data=self.folder / "records.jsonl",
            models=self.folder / "models",
            policy=self.policy,
            audit=AuditLog(self.folder / "audit.jsonl"),
            budget=Budget("a", self.folder, self.policy, SITE),
        )
        identity = Identity(name="a", key=SITE, coordinator=COORDINATOR.public_key())
        return Service(identity, self.folder / "window", trainer)

    def audit(self) -> list[dict[str, Any]]:
        verify(self.folder / "audit.jsonl")
        lines = (self.folder / "audit.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def run_config(**sections: dict[str, object]) -> RunConfig:
    values = {
        "model": {"base": "tiny-llama", "compute_dtype": "float32"},
        "lora": {"rank": 4},
        "training": {"steps": 2, "batch_examples": 4, "max_length": 64},
        **sections,
    }
    return validate(RunConfig, values, "test")


def ask(
    service: Service, kind: pb.Kind, body: Any, issued: int
) -> pb.Description | pb.Update | pb.Refusal:
    """Send one signed instruction and parse the verified reply."""
    return parse(*exchange(service, kind, body, issued))


def exchange(service: Service, kind: pb.Kind, body: Any, issued: int) -> tuple[bytes, bytes]:
    envelope = sign(
        COORDINATOR,
        run="r",
        round_=0 if kind == pb.DESCRIBE else 1,
        site="a",
        kind=kind,
        issued=issued,
        payload=body.SerializeToString(),
    )
    return envelope, service.exchange(envelope)


def parse(sent: bytes, data: bytes) -> pb.Description | pb.Update | pb.Refusal:
    reply = verify_reply(data, SITE.public_key(), site="a", instruction=instruction_digest(sent))
    bodies = {pb.DESCRIPTION: pb.Description, pb.UPDATE: pb.Update, pb.REFUSAL: pb.Refusal}
    return bodies[reply.header.kind].FromString(reply.payload)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    digests = tuple(
        base_digest(save(tmp_path / "models" / name))
        for name, save in (("tiny-llama", save_llama), ("tiny-t5", save_t5))
    )
    rows = [
        {"prompt": f"{MARK} w{i}", "completion": f"w{i + 20}", "patient_id": f"p{i // 2}"}
        for i in range(30)
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Site(tmp_path, Policy(models=Models(digests=digests), limits=Limits(rank=8)))


def describe(config: RunConfig) -> pb.Describe:
    return pb.Describe(config=config.model_dump_json())


def instruct(config: RunConfig, description: pb.Description) -> tuple[pb.Train, AdapterSpec]:
    spec = AdapterSpec(shapes=tuple((t.name, tuple(t.shape)) for t in description.tensors))
    start = initial_adapter(spec, 1, decode(description.given))
    return pb.Train(config=config.model_dump_json(), adapter=encode(start, "float32")), spec


def described(service: Service, config: RunConfig, issued: int = 1) -> pb.Description:
    answer = ask(service, pb.DESCRIBE, describe(config), issued)
    assert isinstance(answer, pb.Description), answer
    return answer


def test_a_site_describes_itself_and_trains(site: Site) -> None:
    service, config = site.service(), run_config()
    train, spec = instruct(config, described(service, config))
    update = ask(service, pb.TRAIN, train, 2)
    assert isinstance(update, pb.Update)
    check_update(decode(update.delta), spec, max_norm=100)
    assert update.examples == 8
    assert set(update.metrics) == {"train_loss", "validation_loss", "step_seconds"}
    assert [line["event"] for line in site.audit()] == ["described", "training", "trained"]


@pytest.mark.parametrize(
    ("sections", "family"),
    [
        ({"model": {"base": "tiny-t5", "compute_dtype": "float32"}}, "seq2seq"),
        ({"lora": {"rank": 4, "dora": True}}, "causal"),
        ({"model": {"base": "tiny-llama", "quantization": "none"}}, "causal"),
    ],
    ids=["seq2seq", "dora", "unquantized"],
)
def test_other_families_and_adapters_go_the_same_way(
    site: Site, sections: dict[str, dict[str, object]], family: str
) -> None:
    service, config = site.service(), run_config(**sections)
    description = described(service, config)
    assert description.family == family
    train, spec = instruct(config, description)
    update = ask(service, pb.TRAIN, train, 2)
    assert isinstance(update, pb.Update)
    check_update(decode(update.delta), spec, max_norm=100)
    assert any(value.any() for value in decode(update.delta).values())


_opened: list[str] = []


def _note_open(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        _opened.append(str(arguments[0]))


sys.addaudithook(_note_open)


@pytest.mark.parametrize(
    ("sections", "rule"),
    [
        ({"lora": {"rank": 9}}, "limits.rank"),
        ({"federation": {"rounds": 1000}}, "limits.rounds"),
        ({"training": {"steps": 201}}, "limits.steps"),
    ],
)
def test_what_the_policy_forbids_is_refused_by_rule_and_the_data_is_not_opened(
    site: Site, sections: dict[str, dict[str, object]], rule: str
) -> None:
    records = str(site.folder / "records.jsonl")
    _opened.clear()
    refusal = ask(site.service(), pb.DESCRIBE, describe(run_config(**sections)), 1)
    assert isinstance(refusal, pb.Refusal)
    assert (refusal.code, refusal.rule) == ("PolicyRefusal", rule)
    assert rule in refusal.sentence
    assert records not in _opened
    assert site.audit()[0]["rule"] == rule
    # The same watch does see the file opened once an instruction is allowed.
    described(site.service(), run_config(), issued=2)
    assert records in _opened


def test_an_unapproved_base_model_is_refused(site: Site) -> None:
    site.policy = Policy(models=Models(digests=("0" * 64,)))
    refusal = ask(site.service(), pb.DESCRIBE, describe(run_config()), 1)
    assert isinstance(refusal, pb.Refusal)
    assert refusal.rule == "models.digests"


def test_figures_that_the_policy_withholds_do_not_leave(site: Site) -> None:
    allowed = Metrics(allowed=("train_loss",))
    site.policy = site.policy.model_copy(update={"metrics": allowed})
    service, config = site.service(), run_config(aggregation={"weighting": "uniform"})
    train, _ = instruct(config, described(service, config))
    update = ask(service, pb.TRAIN, train, 2)
    assert isinstance(update, pb.Update)
    assert (update.examples, update.tokens, set(update.metrics)) == (0, 0, {"train_loss"})


def test_the_newest_instruction_again_is_answered_without_training_twice(site: Site) -> None:
    service, config = site.service(), run_config()
    train, _ = instruct(config, described(service, config))
    sent, first = exchange(service, pb.TRAIN, train, 2)
    assert service.exchange(sent) == first
    assert site.service().exchange(sent) == first
    assert [line["event"] for line in site.audit()].count("trained") == 1


def test_an_instruction_cut_off_in_mid_training_is_carried_out_again_to_the_same_bits(
    site: Site,
) -> None:
    service, config = site.service(), run_config()
    train, _ = instruct(config, described(service, config))
    sent, whole = exchange(service, pb.TRAIN, train, 2)
    # As after a crash between training and storing the reply: window seen, no reply kept.
    for reply in (site.folder / "window").glob("*.reply"):
        reply.unlink()
    again = site.service().exchange(sent)
    first, second = parse(sent, whole), parse(sent, again)
    assert isinstance(first, pb.Update)
    assert isinstance(second, pb.Update)
    assert first.delta == second.delta


def test_a_reply_that_cannot_be_stored_is_refused_and_carried_out_once_there_is_room(
    site: Site,
) -> None:
    service, config = site.service(), run_config()
    train, _ = instruct(config, described(service, config))
    name = hashlib.sha256(b"r").hexdigest() + ".reply.new"
    # As a full disk does, it keeps the file from being written.
    obstacle = site.folder / "window" / name
    obstacle.mkdir()
    sent, data = exchange(service, pb.TRAIN, train, 2)
    refusal = parse(sent, data)
    assert isinstance(refusal, pb.Refusal)
    assert name not in refusal.sentence
    obstacle.rmdir()
    assert isinstance(parse(sent, service.exchange(sent)), pb.Update)


def test_a_second_round_loads_and_reads_nothing_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, config = site.service(), run_config()
    loads: list[Path] = []
    load = BaseModel.load

    def count(folder: Path, *arguments: Any) -> BaseModel:
        loads.append(folder)
        return load(folder, *arguments)

    monkeypatch.setattr(BaseModel, "load", count)
    train, _ = instruct(config, described(service, config))
    assert len(loads) == 1
    records = str(site.folder / "records.jsonl")
    _opened.clear()
    for issued in (2, 3):
        assert isinstance(ask(service, pb.TRAIN, train, issued), pb.Update)
    assert len(loads) == 1
    assert records not in _opened
    assert not any(name.endswith(".safetensors") for name in _opened)


def test_a_bad_record_is_told_to_the_hospital_and_not_to_the_coordinator(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    path = site.folder / "records.jsonl"
    path.write_text(path.read_text() + '{"prompt": "secret diagnosis"}\n')
    refusal = ask(site.service(), pb.DESCRIBE, describe(run_config()), 1)
    assert isinstance(refusal, pb.Refusal)
    assert refusal.code == "DataError"
    assert "records.jsonl" not in refusal.sentence
    assert "records.jsonl" in caplog.text
    assert "31" in caplog.text
    assert "secret" not in caplog.text + refusal.sentence


def test_a_site_with_too_few_records_is_refused(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    path = site.folder / "records.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    refusal = ask(site.service(), pb.DESCRIBE, describe(run_config()), 1)
    assert isinstance(refusal, pb.Refusal)
    assert refusal.code == "DataError"
    assert "site a has" in caplog.text


def test_a_site_that_cannot_write_its_audit_log_does_not_train(site: Site) -> None:
    service, config = site.service(), run_config()
    train, _ = instruct(config, described(service, config))
    (site.folder / "audit.jsonl").unlink()
    (site.folder / "audit.jsonl").mkdir()
    sent, data = exchange(service, pb.TRAIN, train, 2)
    refusal = parse(sent, data)
    assert isinstance(refusal, pb.Refusal)
    assert refusal.code == "AuditError"


def test_an_adapter_that_is_not_this_models_is_refused(site: Site) -> None:
    service, config = site.service(), run_config()
    described(service, config)
    body = pb.Train(config=config.model_dump_json(), adapter=encode({}, "float32"))
    refusal = ask(service, pb.TRAIN, body, 2)
    assert isinstance(refusal, pb.Refusal)
    assert refusal.code == "UpdateError"
