"""Audit log: any change to its past shows, alone or through a head that somebody holds."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedqlora.audit import AuditLog, verify
from fedqlora.errors import AuditError, HistoryError
from fedqlora.head import Head, head_path, read_head

KEY = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"o" * 32)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write(tmp_path / "audit.jsonl")


def write(path: Path, last: int = 3) -> Path:
    writer = AuditLog(path, KEY)
    for round_ in range(1, last + 1):
        writer.append("trained", round=round_)
    return path


def test_a_log_continues_its_chain_after_a_restart(log: Path) -> None:
    AuditLog(log, KEY).append("trained", round=4)
    hashes = verify(log)
    assert AuditLog(log, KEY).head == Head(4, hashes[3])


def edit(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"round": 2', b'"round": 9'), lines[2]]


def remove(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2]]


def reorder(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1]]


def insert(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[0], lines[1], lines[2]]


Change = Callable[[list[bytes]], list[bytes]]


@pytest.mark.parametrize("change", [edit, remove, reorder, insert])
def test_a_changed_past_is_found_at_its_first_line(log: Path, change: Change) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(change(lines)))
    with pytest.raises(AuditError, match="line 2"):
        verify(log)
    with pytest.raises(AuditError):
        AuditLog(log, KEY)


@pytest.mark.parametrize("lines", [2, 3, 4], ids=["cut off", "written anew", "anew and longer"])
def test_a_whole_new_history_passes_the_chain_and_not_its_signed_head(
    log: Path, lines: int
) -> None:
    AuditLog(log, KEY).sign_head()
    log.unlink()
    fresh = AuditLog(log.with_name("fresh.jsonl"), OTHER)
    for _ in range(lines):
        fresh.append("nothing happened")
    fresh.path.rename(log)
    assert len(verify(log)) == lines
    with pytest.raises(HistoryError, match="line 3 as its signed head has it"):
        AuditLog(log, KEY)


def test_a_head_counts_only_with_its_owners_signature(log: Path) -> None:
    AuditLog(log, KEY).sign_head()
    assert read_head(head_path(log), KEY.public_key()).head.number == 3
    with pytest.raises(AuditError, match="not a head that the log's owner signed"):
        read_head(head_path(log), OTHER.public_key())
    forged = json.loads(head_path(log).read_text()) | {"number": 2}
    head_path(log).write_text(json.dumps(forged))
    with pytest.raises(AuditError, match="not a head that the log's owner signed"):
        read_head(head_path(log), KEY.public_key())


def test_a_head_is_signed_anew_while_nothing_else_happens(log: Path) -> None:
    writer, stop = AuditLog(log, KEY), threading.Event()
    writer.sign_head()
    first = head_path(log).read_bytes()
    thread = threading.Thread(target=writer.keep_signed, args=(stop, 0.01))
    thread.start()
    while head_path(log).read_bytes() == first:
        time.sleep(0.01)
    stop.set()
    thread.join()
    assert read_head(head_path(log), KEY.public_key()).head == writer.head


def test_two_processes_share_one_chain(log: Path) -> None:
    one, two = AuditLog(log, KEY), AuditLog(log, KEY)
    one.append("of one")
    two.append("of two")
    one.append("of one")
    assert len(verify(log)) == 6
    assert [line["event"] for line in one.lines()][3:] == ["of one", "of two", "of one"]


def test_a_log_cut_off_under_its_writer_takes_no_further_line(log: Path) -> None:
    writer = AuditLog(log, KEY)
    os.truncate(log, len(log.read_bytes().splitlines(keepends=True)[0]))
    with pytest.raises(HistoryError, match="shorter than it was"):
        writer.append("trained", round=4)


def test_a_line_half_written_at_a_power_cut_is_cut_off_by_the_next(log: Path) -> None:
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"event": "tra')
    AuditLog(log, KEY).append("trained", round=4)
    assert log.read_bytes().startswith(whole)
    assert len(verify(log)) == 4


def test_an_append_reads_nothing_of_what_is_already_there(log: Path) -> None:
    writer = AuditLog(log, KEY)
    # Were the old lines read again, this would be found.
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(edit(lines)))
    writer.append("trained", round=4)
    with pytest.raises(AuditError, match="line 2"):
        verify(log)


def test_a_log_that_cannot_be_written_is_an_error_and_stays_whole(log: Path) -> None:
    writer = AuditLog(log, KEY)
    before = log.read_bytes()
    log.unlink()
    log.mkdir()
    with pytest.raises(AuditError, match="cannot be written"):
        writer.append("trained", round=4)
    log.rmdir()
    log.write_bytes(before)
    assert len(verify(log)) == 3


def test_a_line_holds_what_was_said_and_nothing_else(log: Path) -> None:
    line = json.loads(log.read_text().splitlines()[0])
    assert set(line) == {"number", "time", "event", "round", "hash"}


def check(*arguments: str | Path) -> tuple[int, str]:
    """Run the command as an auditor does: status and what it said."""
    result = subprocess.run(
        [sys.executable, "-m", "fedqlora.verify", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


def test_the_command_names_what_does_not_fit(log: Path) -> None:
    AuditLog(log, KEY).sign_head()
    key = KEY.public_key().public_bytes_raw().hex()
    assert check(log) == (0, "chain: 3 lines fit\n")
    status, said = check(log, "--head", head_path(log), "--key", key)
    assert status == 0
    assert "head: line 3" in said
    assert check(log, "--head", head_path(log))[0] == 2
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:2]))
    assert check(log)[0] == 0, "the chain of a log that was cut off fits"
    status, said = check(log, "--head", head_path(log), "--key", key)
    assert status == 1
    assert "has 2 lines and does not contain line 3" in said
    log.write_bytes(b"".join(edit(lines)))
    status, said = check(log)
    assert status == 1
    assert "line 2" in said
