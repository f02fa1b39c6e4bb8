"""What a hospital's administrator is told: sums of a real audit log, days of a real certificate."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from certs.site import make_all
from client.__main__ import main
from client.standing import describe_certificate, read_standing
from fedqlora.audit import AuditLog
from fedqlora.errors import AuditError

KEY = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
NOW = datetime.datetime(2026, 11, 24, 12, 0, tzinfo=datetime.UTC)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A trainer's folder after two rounds and a refusal."""
    log = AuditLog(tmp_path / "audit.jsonl", KEY)
    log.append("described", run="icd10", round=0, bytes_out=7)
    for round_, sent in ((1, 100), (2, 250)):
        log.append("training", run="icd10", round=round_)
        log.append("trained", run="icd10", round=round_, bytes_out=sent)
    log.append("refused", run="other", round=1, code="policy", rule="limits.rank")
    return tmp_path


def test_a_log_is_summed_up(state: Path) -> None:
    standing = read_standing(state / "audit.jsonl", datetime.datetime.now(datetime.UTC))
    assert standing.trained is not None
    assert standing.trained.startswith("round 2 of run icd10, ")
    assert (standing.bytes_sent, standing.updates, standing.refused) == (357, 2, 1)
    assert standing.lines == 6
    assert not standing.training


def test_a_round_that_began_and_did_not_end_goes_on(state: Path) -> None:
    assert main(["idle", "--state", str(state)]) == 3, "a reply may still be on its way"
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    assert read_standing(state / "audit.jsonl", later).quiet_seconds > 3000
    AuditLog(state / "audit.jsonl", KEY).append("training", run="icd10", round=3)
    assert read_standing(state / "audit.jsonl", later).training


def test_without_a_log_a_site_is_idle_and_has_sent_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["idle", "--state", str(tmp_path)]) == 0
    assert main(["audit", "--state", str(tmp_path)]) == 0
    assert "empty" in capsys.readouterr().out


def test_an_edited_log_is_neither_summed_up_nor_verified(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "--state", str(state)]) == 0
    assert "6 lines fit their chain" in capsys.readouterr().out
    log = state / "audit.jsonl"
    log.write_text(log.read_text().replace('"bytes_out": 250', '"bytes_out": 25'))
    with pytest.raises(AuditError, match="line 5"):
        read_standing(log, NOW)
    assert main(["audit", "--state", str(state)]) == 1
    assert "does not fit its chain at line 5" in capsys.readouterr().err


def test_a_certificate_says_how_long_it_lasts_and_when_renewal_is_due(tmp_path: Path) -> None:
    make_all(tmp_path / "out", ["a"], now=NOW)
    leaf = tmp_path / "out" / "sites" / "a" / "current" / "client.crt"

    def after(days: float) -> str:
        return describe_certificate(leaf, NOW + datetime.timedelta(days=days))

    assert after(0).startswith("90 days left") or after(0).startswith("89 days left")
    assert "renewal" not in after(59)
    assert "renewal is due" in after(61)
    assert after(91).startswith("EXPIRED on 2027-02-2")


def test_checking_records_prints_counts_and_never_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "records.jsonl"
    rows = [f'{{"text": "secret {n}", "patient_id": "p{n // 2}"}}' for n in range(4)]
    records.write_text("\n".join(rows) + "\n")
    assert main(["check-data", "--data", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "records: 4, patients: 2\n"
    records.write_text('{"text": "secret"}\n{"text": 5}\n')
    assert main(["check-data", "--data", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "secret" not in said.out + said.err
    assert "line 2" in said.err
