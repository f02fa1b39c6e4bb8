"""The trainer behind its service: what it opens, what it sends, what it does twice."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from client.policy import Limits, Metrics, Models, Policy
from client.worker import SiteWorker
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import AdapterSpec, check_update, initial_adapter, rank_of
from fedqlora.audit import AuditLog, verify
from fedqlora.codec import decode, decode_delta, encode
from fedqlora.config import RunConfig, validate
from fedqlora.engine.base import base_digest
from fedqlora.engine.model import BaseModel
from fedqlora.engine.service import Identity, Service
from fedqlora.engine.warm import WarmModel
from fedqlora.envelope import NO_HEAD, claimed_header, instruction_digest, sign, verify_reply
from fedqlora.head import Head, head_path, read_head
from server.answer import open_reply
from tests.tiny_models import save_llama, save_t5

COORDINATOR = Ed25519PrivateKey.from_private_bytes(b"c" * 32)
SITE = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
MARK = "w7 w8 w9"


@dataclass
class Site:
    """A hospital's folders, and its service as a restart would build it."""

    folder: Path
    policy: Policy
    peers: dict[str, Ed25519PublicKey] = field(default_factory=dict)

    def service(self) -> Service:
        audit = AuditLog(self.folder / "audit.jsonl", SITE)
        trainer = SiteWorker(
            site="a",
            data=self.folder / "records.jsonl",
            models=self.folder / "models",
            state=self.folder,
            policy=self.policy,
            peers=self.peers,
            key=SITE,
            audit=audit,
            warm=WarmModel(),
        )
        identity = Identity(name="a", key=SITE, coordinator=COORDINATOR.public_key())
        return Service(identity, self.folder / "window", trainer, audit=audit)

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


def ask(service: Service, kind: pb.Kind, body: Any, issued: int, seen: Head = NO_HEAD) -> Any:
    """Send one signed instruction and parse the verified reply."""
    return parse(*exchange(service, kind, body, issued, seen))


def exchange(
    service: Service,
    kind: pb.Kind,
    body: Any,
    issued: int,
    seen: Head = NO_HEAD,
    round_: int = 1,
) -> tuple[bytes, bytes]:
    envelope = sign(
        COORDINATOR,
        run="r",
        round_=0 if kind == pb.DESCRIBE else round_,
        site="a",
        kind=kind,
        issued=issued,
        payload=body.SerializeToString(),
        seen=seen,
    )
    return envelope, service.exchange(envelope)


def parse(sent: bytes, data: bytes) -> Any:
    """The reply as the centre reads it."""
    asked, digest = claimed_header(sent).kind, instruction_digest(sent)
    return open_reply(data, SITE.public_key(), site="a", instruction=digest, asked=asked)[1]


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
        ({"lora": {"rank": 4, "dora": True}, "aggregation": {"method": "fedavg"}}, "causal"),
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


def delta_of(answer: tuple[bytes, bytes]) -> pb.Tensors:
    update = parse(*answer)
    assert isinstance(update, pb.Update), update
    return update.delta


def test_what_a_round_left_out_goes_into_the_next_one_once_whatever_is_done_twice(
    site: Site,
) -> None:
    config = run_config(codec={"update": "nf4"}, aggregation={"method": "fedavg"})
    service = site.service()
    train, spec = instruct(config, described(service, config))
    first = delta_of(exchange(service, pb.TRAIN, train, 2))
    # A restart: the next round takes it from the disk.
    answer = exchange(site.service(), pb.TRAIN, train, 3, round_=2)
    second = delta_of(answer)
    # As after a crash between keeping what is left out and storing the reply.
    for reply in (site.folder / "window").glob("*.reply"):
        reply.unlink()
    assert delta_of((answer[0], site.service().exchange(answer[0]))) == second
    # As after a crash of the ServerApp, which asks for the round again with a new number.
    assert delta_of(exchange(site.service(), pb.TRAIN, train, 4, round_=2)) == second
    plain = run_config(codec={"update": "nf4", "error_feedback": False})
    train.config = plain.model_dump_json()
    forgetful = delta_of(exchange(site.service(), pb.TRAIN, train, 5, round_=2))
    assert forgetful != second
    check_update(decode_delta(first, spec), spec, max_norm=100)
    check_update(decode_delta(second, spec), spec, max_norm=100)


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


def test_a_log_without_a_line_that_the_coordinator_has_seen_refuses_to_train(site: Site) -> None:
    service, config = site.service(), run_config()
    train, _ = instruct(config, described(service, config))
    assert isinstance(ask(service, pb.TRAIN, train, 2), pb.Update)
    seen = AuditLog(site.folder / "audit.jsonl", SITE).head
    assert isinstance(ask(service, pb.TRAIN, train, 3, seen), pb.Update)
    # Whoever holds the disk restores what was there before that: its own chain fits.
    log = site.folder / "audit.jsonl"
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    head_path(log).unlink()
    records = str(site.folder / "records.jsonl")
    _opened.clear()
    refusal = ask(site.service(), pb.TRAIN, train, 4, seen)
    assert isinstance(refusal, pb.Refusal)
    assert (refusal.code, refusal.rule) == ("HistoryError", "audit.head")
    assert f"does not contain line {seen.number} as the coordinator" in refusal.sentence
    assert site.audit()[-1]["rule"] == "audit.head"
    assert records not in _opened


def test_every_reply_carries_the_head_that_is_signed_beside_the_log(site: Site) -> None:
    service = site.service()
    for body, issued in ((describe(run_config()), 1), (pb.Describe(config="{"), 2)):
        sent, data = exchange(service, pb.DESCRIBE, body, issued)
        reply = verify_reply(
            data, SITE.public_key(), site="a", instruction=instruction_digest(sent)
        )
        log = site.folder / "audit.jsonl"
        assert reply.own == Head(issued, verify(log)[-1])
        assert read_head(head_path(log), SITE.public_key()).head == reply.own


def test_the_metrics_file_goes_on_over_a_restart(site: Site) -> None:
    service, config = site.service(), run_config()
    train, _ = instruct(config, described(service, config))
    assert isinstance(ask(service, pb.TRAIN, train, 2), pb.Update)
    path = site.folder / "metrics.prom"
    before = path.read_text()
    sent = sum(line.get("bytes_out", 0) for line in site.audit())
    assert "fedqlora_trainer_rounds_total 1.0" in before
    assert f"fedqlora_trainer_sent_bytes_total {float(sent)}" in before
    assert "fedqlora_trainer_audit_head_number 3.0" in before
    path.unlink()
    service = site.service()
    assert "fedqlora_trainer_rounds_total 1.0" in path.read_text()
    ask(service, pb.DESCRIBE, describe(run_config(lora={"rank": 9})), 3)
    assert "fedqlora_trainer_refusals_total 1.0" in path.read_text()


def test_the_audit_log_names_digests_and_decisions_and_nothing_of_a_record(site: Site) -> None:
    service, config = site.service(), run_config()
    train, _ = instruct(config, described(service, config))
    update = ask(service, pb.TRAIN, train, 2)
    assert isinstance(update, pb.Update)
    lines = site.audit()
    assert lines[2]["tensors"] == hashlib.sha256(update.delta.data).hexdigest()
    assert lines[2]["bytes_out"] == update.ByteSize()
    assert [line.get("decision") for line in lines] == ["allowed", "allowed", None]
    assert set().union(*lines) == {
        *("number", "time", "event", "hash", "run", "round", "decision", "policy", "base"),
        *("server_number", "server_hash", "bytes_out", "tensors", "figures"),
    }
    text = (site.folder / "audit.jsonl").read_text()
    assert not any(word in text for word in (MARK, "records", "p1", "completion"))


def test_an_adapter_that_is_not_this_models_is_refused(site: Site) -> None:
    service, config = site.service(), run_config()
    described(service, config)
    body = pb.Train(config=config.model_dump_json(), adapter=encode({}, "float32"))
    refusal = ask(service, pb.TRAIN, body, 2)
    assert isinstance(refusal, pb.Refusal)
    assert refusal.code == "UpdateError"


def residual_of(spec: AdapterSpec, rank: int) -> pb.Tensors:
    start = initial_adapter(spec.at_rank(rank), 2, {})
    return encode({name: value + 0.01 for name, value in start.items()}, "float32")


def test_a_residual_is_trained_beside_and_does_not_leave(site: Site) -> None:
    service, config = site.service(), run_config()
    train, spec = instruct(config, described(service, config))
    alone = ask(service, pb.TRAIN, train, 2)
    train.residual.CopyFrom(residual_of(spec, 7))
    update = ask(service, pb.TRAIN, train, 3)
    assert isinstance(alone, pb.Update)
    assert isinstance(update, pb.Update)
    check_update(decode(update.delta), spec, max_norm=100)
    assert update.metrics["validation_loss"] != alone.metrics["validation_loss"]
    assert update.delta != alone.delta


@pytest.mark.parametrize(
    ("method", "rank", "sentence"),
    [("fedavg", 1, "more than the 0"), ("exact_svd", 17, "more than the 16")],
)
def test_a_residual_that_the_run_does_not_have_is_refused(
    site: Site, method: str, rank: int, sentence: str
) -> None:
    service, config = site.service(), run_config(aggregation={"method": method})
    train, spec = instruct(config, described(service, config))
    train.residual.CopyFrom(residual_of(spec, rank))
    refusal = ask(service, pb.TRAIN, train, 2)
    assert isinstance(refusal, pb.Refusal)
    assert refusal.code == "UpdateError"
    assert sentence in refusal.sentence


@pytest.mark.parametrize("method", ["ffa", "rolora", "fedsvd"])
def test_only_b_leaves_where_a_is_frozen(site: Site, method: str) -> None:
    service, config = site.service(), run_config(aggregation={"method": method})
    train, spec = instruct(config, described(service, config))
    update = ask(service, pb.TRAIN, train, 2)
    assert isinstance(update, pb.Update)
    assert set(decode(update.delta)) == {name for name, _ in spec.shapes if ".lora_B." in name}


def test_a_site_below_the_runs_rank_describes_the_runs_adapter_and_trains_its_own(
    site: Site,
) -> None:
    site.policy = site.policy.model_copy(update={"limits": Limits(rank=2)})
    config = run_config(lora={"rank": 4, "mixed_ranks": True})
    service = site.service()
    train, spec = instruct(config, described(service, config))
    assert rank_of(decode(train.adapter)) == 4
    train.residual.CopyFrom(residual_of(spec, 3))
    update = ask(service, pb.TRAIN, train, 2)
    assert isinstance(update, pb.Update)
    check_update(decode(update.delta), spec.at_rank(2), max_norm=100)
    refusal = ask(service, pb.DESCRIBE, describe(run_config(lora={"rank": 4})), 3)
    assert isinstance(refusal, pb.Refusal)
    assert refusal.rule == "limits.rank"


def test_control_variates_leave_as_changes_and_correct_the_next_round(site: Site) -> None:
    sections: dict[str, dict[str, object]] = {
        "training": {"steps": 2, "batch_examples": 4, "max_length": 64, "control_variates": True},
        "aggregation": {"method": "ffa"},
        "codec": {"update": "float32"},
    }
    config = run_config(**sections)
    train, spec = instruct(config, described(site.service(), config))
    names = [name for name, _ in spec.shapes if ".lora_B." in name]
    adapter = decode(train.adapter)
    everyone = {name: np.zeros_like(adapter[name]) for name in names}
    train.control.CopyFrom(encode(everyone, "float32"))
    first = ask(site.service(), pb.TRAIN, train, 2)
    assert isinstance(first, pb.Update)
    gradient = decode(first.control)
    assert sorted(gradient) == sorted(names)
    assert all(value.any() for value in gradient.values())
    # Everyone's gradient is this site's: the next instruction corrects nothing, and differs from
    # one that still says zero.
    train.control.CopyFrom(encode(gradient, "float32"))
    second, envelope_round = [], 2
    for issued, control in ((3, gradient), (4, everyone)):
        train.control.CopyFrom(encode(control, "float32"))
        sent, data = exchange(site.service(), pb.TRAIN, train, issued, round_=envelope_round)
        update = parse(sent, data)
        assert isinstance(update, pb.Update)
        second.append(update)
    assert second[0].delta.data != second[1].delta.data
    # Done again from the round before: the same change of the same first gradient.
    line = site.audit()[-1]
    assert line["control"] == hashlib.sha256(second[1].control.data).hexdigest()


def test_a_site_without_the_centres_control_variate_refuses_the_round(site: Site) -> None:
    sections: dict[str, dict[str, object]] = {
        "training": {"steps": 2, "batch_examples": 4, "max_length": 64, "control_variates": True},
        "aggregation": {"method": "fedavg"},
    }
    config = run_config(**sections)
    train, _ = instruct(config, described(site.service(), config))
    refusal = ask(site.service(), pb.TRAIN, train, 2)
    assert isinstance(refusal, pb.Refusal)
    assert refusal.code == "UpdateError"
