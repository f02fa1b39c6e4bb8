"""Interruption: at no write of any command is anybody left with half of a change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from certs.change import changing
from certs.files import CertificateError
from certs.inspection import inspect_all
from certs.rotation import rotate

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        *("make", "admit", "rotate", "revoke", "trust", "switch", "retire"),
        *("sign", "sign-renewal", "accept", "accept-renewal"),
    ],
)
def test_everybody_gets_along_after_an_interruption_at_any_write_and_the_next_call_ends_it(
    tmp_path: Path, command: str
) -> None:
    line = [sys.executable, "-m", "tests.certs.interrupted", command, "mixed", str(tmp_path)]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    # Fewer would mean that the writes are no longer seen.
    assert int(result.stdout) > 30


def test_two_commands_do_not_change_the_same_folder_at_once(damaged: Path) -> None:
    with changing(damaged), pytest.raises(CertificateError, match="cannot be locked"):
        rotate(damaged)
    assert rotate(damaged)


@pytest.mark.parametrize("content", ["", "garbage", "[]", '{"action": "rotate"}'])
def test_a_garbled_record_of_a_change_is_one_error(damaged: Path, content: str) -> None:
    (damaged / ".change.json").write_text(content)
    with pytest.raises(CertificateError, match="does not hold a change"):
        rotate(damaged)
    assert any("was interrupted" in one for one in inspect_all(damaged).problems)
