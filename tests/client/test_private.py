"""A private run at one site: budget, ledger, receipt, and what must not leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from client.__main__ import main
from client.ledger import Ledger, make_ledger
from client.policy import Policy, Privacy
from client.standing import describe_privacy
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import AdapterSpec, initial_adapter
from fedqlora.codec import decode, decode_delta, encode
from fedqlora.config import RunConfig, validate
from fedqlora.errors import ConfigError, LedgerError, ReceiptError
from fedqlora.halves import Method, select_trained
from fedqlora.privacy.receipts import Receipt, check_receipts, open_receipt, sign_receipt
from fedqlora.verify import main as verify
from tests.client import test_worker
from tests.client.test_worker import SITE, Site, ask, describe, exchange, instruct, parse

site = test_worker.site
PROMISE = {"unit": "patient", "epsilon": 8.0, "delta": 0.01}
KEYS = {"a": SITE.public_key()}


def private_config(**sections: dict[str, object]) -> RunConfig:
    defaults: dict[str, dict[str, object]] = {
        "training": {"steps": 2, "batch_examples": 4, "max_length": 64, "packing": False},
        "data": {"validation_fraction": 0},
        "aggregation": {"method": "fedavg", "weighting": "uniform"},
        "federation": {"rounds": 2},
        "privacy": PROMISE,
    }
    return test_worker.run_config(**{**defaults, **sections})


def call_init(site: Site) -> int:
    keys = site.folder / "keys"
    keys.mkdir(exist_ok=True)
    pem = SITE.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (keys / "signing.key").write_bytes(pem)
    return main(["ledger", "init", "--site", "a", "--state", str(site.folder), "--keys", str(keys)])


def begin(site: Site) -> None:
    assert call_init(site) == 0


def refused(site: Site, config: RunConfig, issued: int = 1, **body: Any) -> pb.Refusal:
    message = pb.Describe(config=config.model_dump_json(), **body)
    answer = ask(site.service(), pb.DESCRIBE, message, issued)
    assert isinstance(answer, pb.Refusal), answer
    return answer


def train(site: Site, config: RunConfig, issued: int = 2) -> pb.Update | pb.Refusal:
    service = site.service()
    description = ask(service, pb.DESCRIBE, describe(config), issued - 1)
    assert isinstance(description, pb.Description), description
    message, _ = instruct(config, description)
    return ask(service, pb.TRAIN, message, issued)  # type: ignore[return-value]


def test_a_private_round_leaves_a_receipt_and_no_figure(site: Site) -> None:
    assert describe_privacy(site.folder) == "not accounted, for this site has no ledger"
    begin(site)
    assert describe_privacy(site.folder) == "nothing yet"
    update = train(site, private_config())
    assert isinstance(update, pb.Update), update
    assert (update.examples, update.tokens, dict(update.metrics)) == (0, 0, {})
    receipt = open_receipt(update.receipt, KEYS)
    assert (receipt.unit, receipt.steps, receipt.sampling_rate) == ("patient", 2, 4 / 15)
    assert receipt.epsilon_round < receipt.epsilon_run * 1.0001 < 8
    assert update.ledger_head == receipt.ledger_head
    assert Ledger(site.folder / "ledger.jsonl", "a", SITE).head == update.ledger_head
    assert describe_privacy(site.folder) == (
        f"epsilon {receipt.epsilon_cohort:.3g} at delta 0.01 for each patient of cohort all, "
        "over all runs"
    )
    key = SITE.public_key().public_bytes_raw().hex()
    assert verify(["receipts", str(site.folder / "receipts.jsonl"), "--key", f"a={key}"]) == 0


@pytest.mark.parametrize("method", ["exact_svd", "fedavg", "ffa", "fedsvd", "rolora"])
def test_a_private_update_has_what_trains_in_its_round_and_nothing_else(
    site: Site, method: Method
) -> None:
    begin(site)
    config = private_config(aggregation={"method": method, "weighting": "uniform"})
    service = site.service()
    description = ask(service, pb.DESCRIBE, describe(config), 1)
    message, spec = instruct(config, description)
    start = decode(message.adapter)
    if method == "exact_svd":
        beside = initial_adapter(spec.at_rank(6), 2, {})
        message.residual.CopyFrom(encode(beside, "float32"))
    for round_ in (1, 2):
        names = select_trained(start, method, round_)
        update = parse(*exchange(service, pb.TRAIN, message, 1 + round_, round_=round_))
        assert isinstance(update, pb.Update), update
        delta = decode_delta(update.delta, AdapterSpec.of({name: start[name] for name in names}))
        assert all(value.any() for value in delta.values())
        receipt = open_receipt(update.receipt, KEYS)
        assert receipt.run_steps == 2 * round_
    assert len(names) == len(start) // (1 if method in ("exact_svd", "fedavg") else 2)


def test_a_private_round_has_the_residual_beside_it_and_refuses_one_of_another_run(
    site: Site,
) -> None:
    begin(site)
    config = private_config(aggregation={"method": "exact_svd", "weighting": "uniform"})
    service = site.service()
    message, spec = instruct(config, ask(service, pb.DESCRIBE, describe(config), 1))
    message.residual.CopyFrom(encode(initial_adapter(spec.at_rank(17), 2, {}), "float32"))
    refusal = ask(service, pb.TRAIN, message, 2)
    assert isinstance(refusal, pb.Refusal)
    assert refusal.code == "UpdateError"
    assert "rank 17, more than the 16 that the run allows" in refusal.sentence
    assert not Ledger(site.folder / "ledger.jsonl", "a", SITE).spent("all"), "nothing was trained"


def test_two_trainers_of_one_site_cannot_both_spend_what_is_left(site: Site) -> None:
    begin(site)
    assert isinstance(train(site, private_config()), pb.Update)
    path = site.folder / "ledger.jsonl"
    one, other = Ledger(path, "a", SITE), Ledger(path, "a", SITE)
    plan = one.newest_plan("all")
    assert plan is not None
    one.charge(plan, 2, 1)
    with pytest.raises(LedgerError, match="run one trainer of this site only"):
        other.charge(plan, 2, 1)
    assert [spent.steps for spent in Ledger(path, "a", SITE).spent("all")] == [2, 1]


def test_every_single_changed_field_of_a_receipt_is_found(site: Site, tmp_path: Path) -> None:
    begin(site)
    update = train(site, private_config())
    assert isinstance(update, pb.Update)
    values = json.loads(update.receipt)
    for name, value in values["receipt"].items():
        other = value + 1 if isinstance(value, int | float) else f"{value}x"
        if isinstance(value, list):
            other = [*value, [0.5, 9.0, 1]]
        changed = {**values, "receipt": {**values["receipt"], name: other}}
        with pytest.raises(ReceiptError):
            open_receipt(json.dumps(changed).encode(), KEYS)
    # Signed by the site itself, it is the recomputed epsilon that does not fit.
    honest = Receipt.model_validate(values["receipt"])
    for name in ("epsilon_round", "epsilon_run", "epsilon_cohort"):
        lie = honest.model_copy(update={name: getattr(honest, name) - 2e-6})
        line = sign_receipt(lie, SITE)
        with pytest.raises(ReceiptError, match=f"{name} is"):
            open_receipt(line, KEYS)
    forgetful = tmp_path / "receipts.jsonl"
    more = honest.model_copy(update={"cohort_spent": ()})
    forgetful.write_bytes(update.receipt + b"\n" + sign_receipt(more, SITE) + b"\n")
    with pytest.raises(ReceiptError, match="account lacks this round"):
        check_receipts(forgetful, KEYS)


def test_a_site_without_a_ledger_does_not_start_at_zero(site: Site) -> None:
    assert refused(site, private_config()).code == "LedgerError"
    begin(site)
    assert isinstance(train(site, private_config(), issued=4), pb.Update)
    (site.folder / "ledger.jsonl").unlink()
    assert refused(site, private_config(), issued=5).code == "LedgerError"
    # Nor can a new one be made where there was one: the audit log remembers.
    assert call_init(site) == 1
    assert not (site.folder / "ledger.jsonl").exists()


def test_a_ledger_that_is_there_is_not_made_anew(site: Site) -> None:
    begin(site)
    update = train(site, private_config())
    assert isinstance(update, pb.Update)
    begin(site)
    assert Ledger(site.folder / "ledger.jsonl", "a", SITE).head == update.ledger_head


def test_another_sites_a_damaged_and_an_older_ledger_are_refused(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    begin(site)
    path = site.folder / "ledger.jsonl"
    old = path.read_bytes()
    update = train(site, private_config())
    assert isinstance(update, pb.Update)
    new = path.read_bytes()
    heads = {"a": update.ledger_head}
    path.write_bytes(old)
    refusal = refused(site, private_config(), 3, ledger_heads=heads)
    assert refusal.code == "LedgerError"
    assert "older than" in caplog.text
    path.write_bytes(new.replace(b'"steps": 2', b'"steps": 1'))
    assert refused(site, private_config(), 4).code == "LedgerError"
    assert "does not fit its chain" in caplog.text
    make_ledger("b", site.folder / "another", SITE)
    path.write_bytes((site.folder / "another" / "ledger.jsonl").read_bytes())
    assert refused(site, private_config(), 5).code == "LedgerError"
    assert "is not site a's" in caplog.text
    # The true one is good with the same head, and a line that a crash cut off does no harm.
    path.write_bytes(new + b'{"event": "sp')
    message = pb.Describe(config=private_config().model_dump_json(), ledger_heads=heads)
    assert isinstance(ask(site.service(), pb.DESCRIBE, message, 6), pb.Description)
    assert path.read_bytes() == new


def test_a_round_whose_reply_was_lost_is_charged_twice_and_the_run_stops_by_itself(
    site: Site,
) -> None:
    begin(site)
    config = private_config(federation={"rounds": 1})
    service = site.service()
    description = ask(service, pb.DESCRIBE, describe(config), 1)
    assert isinstance(description, pb.Description)
    message, _ = instruct(config, description)
    sent, first = exchange(service, pb.TRAIN, message, 2)
    assert isinstance(parse(sent, first), pb.Update)
    # As after a kill between the ledger's line and the reply: charged, and nothing has left.
    for reply in (site.folder / "window").glob("*.reply"):
        reply.unlink()
    again = parse(sent, site.service().exchange(sent))
    assert isinstance(again, pb.Refusal)
    assert again.code == "PrivacyError"
    assert "has spent its privacy.epsilon" in again.sentence


def test_a_cohort_without_budget_is_refused_by_rule_and_its_records_stay_closed(
    site: Site,
) -> None:
    begin(site)
    site.policy = site.policy.model_copy(
        update={"privacy": Privacy(unit="patient", epsilon=9.0, delta=0.01)}
    )
    # The budget would hold the first run, but not a second one beside it.
    assert isinstance(train(site, private_config(federation={"rounds": 1})), pb.Update)
    config = private_config(federation={"rounds": 1})
    message = pb.Describe(config=config.model_dump_json())
    sent = test_worker.sign(
        test_worker.COORDINATOR, run="second", round_=0, site="a", kind=pb.DESCRIBE, issued=1,
        payload=message.SerializeToString(),
    )  # fmt: skip
    service = site.service()
    test_worker._opened.clear()
    refusal = parse(sent, service.exchange(sent))
    assert isinstance(refusal, pb.Refusal)
    assert (refusal.code, refusal.rule) == ("PolicyRefusal", "privacy.epsilon")
    assert str(site.folder / "records.jsonl") not in test_worker._opened


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        ({"unit": "none"}, "privacy.unit"),
        ({**PROMISE, "unit": "example"}, "privacy.unit"),
        ({**PROMISE, "epsilon": 9.5}, "privacy.epsilon"),
        ({**PROMISE, "delta": 0.02}, "privacy.delta"),
    ],
)
def test_a_weaker_promise_than_the_policys_is_refused_by_rule(
    site: Site, asked: dict[str, object], rule: str
) -> None:
    privacy = Privacy(unit="patient", epsilon=9.0, delta=0.01)
    site.policy = site.policy.model_copy(update={"privacy": privacy})
    test_worker._opened.clear()
    assert refused(site, private_config(privacy=asked)).rule == rule
    assert str(site.folder / "records.jsonl") not in test_worker._opened


def test_records_without_a_patient_are_refused_under_the_patient_unit(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    begin(site)
    path = site.folder / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["patient_id"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert refused(site, private_config()).code == "DataError"
    assert "no patient_id" in caplog.text


def test_an_epsilon_that_cannot_be_met_is_refused_before_the_run(site: Site) -> None:
    begin(site)
    config = private_config(privacy={"unit": "patient", "epsilon": 1e-4, "delta": 1e-6})
    refusal = refused(site, config)
    assert refusal.code == "PrivacyError"
    assert "cannot be met" in refusal.sentence


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"privacy": {"unit": "patient"}}, "needs privacy.epsilon"),
        ({"training": {}}, "set training.packing = false"),
        ({"aggregation": {"method": "fedavg", "weighting": "tokens"}}, "exact count"),
        ({"data": {}}, "set data.validation_fraction = 0"),
        ({"lora": {"dora": True}}, "set lora.dora = false"),
        ({"privacy": {**PROMISE, "max_examples_per_patient": 0}}, "greater than or equal to 1"),
    ],
)
def test_what_would_break_the_promise_is_refused_in_one_sentence(
    sections: dict[str, object], sentence: str
) -> None:
    values = private_config().model_dump(mode="json")
    with pytest.raises(ConfigError, match=sentence.replace(".", r"\.")):
        validate(RunConfig, {**values, **sections}, "run.toml")


def test_a_policy_with_an_epsilon_and_no_delta_is_refused() -> None:
    with pytest.raises(ConfigError, match="epsilon means nothing without delta"):
        validate(
            Policy,
            {"models": {"digests": ["0"]}, "privacy": {"unit": "patient", "epsilon": 1}},
            "policy.toml",
        )
