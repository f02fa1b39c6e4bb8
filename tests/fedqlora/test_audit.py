"""Audit log: any change to its past shows."""

import json
from pathlib import Path

import pytest

from fedqlora.audit import AuditLog, verify
from fedqlora.errors import AuditError


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    writer = AuditLog(path)
    for round_ in (1, 2, 3):
        writer.append("trained", round=round_)
    return path


def test_a_log_continues_its_chain_after_a_restart(log: Path) -> None:
    AuditLog(log).append("trained", round=4)
    number, head = verify(log)
    assert number == 4
    assert head == AuditLog(log).head


def edit(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"round": 2', b'"round": 9'), lines[2]]


def remove(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2]]


def reorder(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1]]


def insert(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[0], lines[1], lines[2]]


@pytest.mark.parametrize("change", [edit, remove, reorder, insert])
def test_a_changed_past_is_found_at_its_first_line(log: Path, change: object) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(change(lines)))  # type: ignore[operator]
    with pytest.raises(AuditError, match="line 2"):
        verify(log)
    with pytest.raises(AuditError):
        AuditLog(log)


def test_a_log_that_cannot_be_written_is_an_error_and_stays_whole(log: Path) -> None:
    writer = AuditLog(log)
    before = log.read_bytes()
    log.unlink()
    log.mkdir()
    with pytest.raises(AuditError, match="cannot be written"):
        writer.append("trained", round=4)
    log.rmdir()
    log.write_bytes(before)
    assert verify(log)[0] == 3


def test_a_line_holds_what_was_said_and_nothing_else(log: Path) -> None:
    line = json.loads(log.read_text().splitlines()[0])
    assert set(line) == {"number", "time", "event", "round", "hash"}
