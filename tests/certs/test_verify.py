"""Verifying keys: what damage is found, what the table shows and how the command ends."""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from certs.__main__ import main
from certs.files import read_certificates
from certs.inspection import inspect_all
from certs.site import make_all
from tests.certs.peers import superlink

NOW = datetime.datetime.now(datetime.UTC)


def _verify(out: Path) -> int:
    return main(["verify", "--out", str(out)])


def test_a_whole_federation_has_no_problem_and_a_row_for_each_key(
    federation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verify(federation) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[0] == "name"
    table = [[cell for cell in row.split("  ") if cell] for row in rows]
    cells = {row[0]: [cell.strip() for cell in row[1:]] for row in table}
    chains = {"superlink": "superlink/current/server.crt", "site b": "sites/b/current/client.crt"}
    for name, path in chains.items():
        leaf = read_certificates(federation / path)[0]
        assert int(cells[name].pop(), 16) == leaf.serial_number
    day = (NOW + datetime.timedelta(days=60)).date().isoformat()
    assert cells["superlink"] == [
        "fedqlora server authority",
        "localhost, 127.0.0.1, ::1, superlink, fed.example.org",
        "89",
        day,
        "0600",
        "yes",
    ]
    assert cells["site b"] == [
        "fedqlora sites authority",
        "urn:fedqlora:site:b",
        "89",
        day,
        "0600",
        "yes",
    ]
    assert cells["site b signing"] == ["-", "-", "-", "-", "0600", "yes", "-"]
    # root and two authorities, SuperLink, coordinator and evaluator, three keys for each site,
    # the revocation list
    assert len(cells) == 3 + 1 + 2 + 2 * 3 + 1


def test_a_key_that_others_can_read_is_a_problem(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = damaged / "sites" / "a" / "current" / "signing.key"
    key.chmod(0o644)
    assert _verify(damaged) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if "problem" in line]
    assert len(problems) == 1
    assert f"{key} has mode 0644" in problems[0]


@pytest.mark.parametrize("name", ["client.key", "signing.key", "supernode.key"])
def test_a_swapped_key_of_another_site_is_a_problem(damaged: Path, name: str) -> None:
    key = damaged / "sites" / "a" / "current" / name
    shutil.copy2(damaged / "sites" / "b" / "current" / name, key)
    report = inspect_all(damaged)
    assert [row.name for row in report.rows if row.matches is False] == [
        {"client.key": "site a"}.get(name, f"site a {name.removesuffix('.key')}")
    ]
    assert [problem for problem in report.problems if str(key) in problem] == report.problems


def test_a_public_supernode_key_that_is_not_the_private_ones_is_a_problem(damaged: Path) -> None:
    # It is what gets registered: the SuperNode would be turned away for no visible reason.
    folder = damaged / "sites" / "a" / "current"
    shutil.copy2(damaged / "sites/b/current/supernode.pub", folder / "supernode.pub")
    report = inspect_all(damaged)
    assert [row.name for row in report.rows if row.matches is False] == ["site a supernode"]
    assert len(report.problems) == 1


def test_a_site_with_the_whole_identity_of_another_is_a_problem(damaged: Path) -> None:
    shutil.rmtree(damaged / "sites" / "a")
    shutil.copytree(damaged / "sites" / "b", damaged / "sites" / "a", symlinks=True)
    report = inspect_all(damaged)
    assert {row.name for row in report.rows if row.matches is False} == {
        "site a", "site a supernode", "site a signing",
    }  # fmt: skip
    assert any("not accepted as site a" in problem for problem in report.problems)


def test_keys_of_another_federation_are_a_problem_on_both_sides(
    damaged: Path, tmp_path: Path
) -> None:
    make_all(tmp_path / "other", ["a"])
    shutil.rmtree(damaged / "superlink")
    shutil.copytree(tmp_path / "other" / "superlink", damaged / "superlink", symlinks=True)
    problems = inspect_all(damaged).problems
    for site in ("a", "b"):
        trust = damaged / "sites" / site / "current" / "ca.crt"
        assert any("server.crt is not accepted" in one and str(trust) in one for one in problems)
        assert any(f"not accepted as site {site}" in one for one in problems)


def test_another_coordinators_key_at_a_site_is_a_problem(damaged: Path, tmp_path: Path) -> None:
    make_all(tmp_path / "other", ["a"])
    path = damaged / "sites" / "a" / "current" / "coordinator.pub"
    shutil.copy2(tmp_path / "other" / "evaluator" / "coordinator.pub", path)
    assert inspect_all(damaged).problems == [
        f"{path} is not the coordinator's public key; restore it."
    ]


def test_a_roster_with_a_changed_byte_is_a_problem(damaged: Path) -> None:
    roster = damaged / "coordinator" / "roster.json"
    roster.write_bytes(roster.read_bytes().replace(b'"b"', b'"c"'))
    assert inspect_all(damaged).problems[0].startswith(f"{roster} is not signed")


def test_a_site_that_is_gone_or_not_in_the_roster_is_a_problem(damaged: Path) -> None:
    (damaged / "sites" / "b").rename(damaged / "sites" / "c")
    report = inspect_all(damaged)
    assert any("roster names site b" in problem for problem in report.problems)
    assert [row.name for row in report.rows if row.matches is False] == [
        "site c", "site c supernode", "site c signing",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("sites/a/current/client.crt", None),
        ("sites/a/current/client.crt", b"garbage"),
        ("sites/a/current/client.key", b""),
        ("sites/a/current/supernode.key", b"garbage"),
        ("sites/a/current/coordinator.pub", None),
        ("superlink/current/ca.crt", b"garbage"),
        ("superlink/current/server.key", None),
        ("authority/sites.key", None),
        ("coordinator/signing.key", b"garbage"),
        ("coordinator/roster.sig", None),
        ("evaluator/signing.key", None),
    ],
)
def test_a_lost_or_garbled_file_is_named(damaged: Path, path: str, content: bytes | None) -> None:
    (damaged / path).unlink()
    if content is not None:
        (damaged / path).write_bytes(content)
    assert any(str(damaged / path) in problem for problem in inspect_all(damaged).problems)


@pytest.mark.parametrize(
    ("days", "warnings", "problem"),
    [
        (59, 0, None),
        (61, 3, None),
        (84, 0, "ends in 5 days"),
        (91, 0, "ended on"),
        (-1, 0, "is not valid before"),
    ],
)
def test_certificates_are_judged_by_the_days_they_have_left(
    tmp_path: Path, days: int, warnings: int, problem: str | None
) -> None:
    make_all(tmp_path, ["a", "b"], now=NOW)
    report = inspect_all(tmp_path, now=NOW + datetime.timedelta(days=days, hours=1))
    assert len(report.warnings) == warnings
    # The list ends after a month: what is looked at here is the certificates.
    report.problems[:] = [one for one in report.problems if "revocation list" not in one]
    leaves = ("superlink", "site a", "site b")
    found = [one for one in report.problems if one.split(" of ")[1].startswith(leaves)]
    if problem is None:
        assert report.problems == []
    else:
        assert [problem in one for one in found] == [True] * 3


def test_a_new_certificate_is_valid_for_a_machine_whose_clock_is_behind(tmp_path: Path) -> None:
    make_all(tmp_path, ["a"], now=NOW)
    assert inspect_all(tmp_path, now=NOW - datetime.timedelta(minutes=9)).problems == []


def test_the_command_ends_with_1_for_a_certificate_that_ends_within_a_week(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_all(tmp_path, ["a"], now=NOW - datetime.timedelta(days=85))
    assert _verify(tmp_path) == 1
    assert "The certificate of site a ends in 4 days" in capsys.readouterr().out


def test_the_command_ends_with_0_and_a_warning_within_a_month(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_all(tmp_path, ["a"], now=NOW - datetime.timedelta(days=70))
    make_all(tmp_path, ["a"])
    assert _verify(tmp_path) == 0
    assert "warning: The certificate of site a ends in 19 days" in capsys.readouterr().out


def test_the_root_key_may_be_elsewhere_without_a_problem(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (damaged / "authority" / "ca.key").unlink()
    assert _verify(damaged) == 0
    root = capsys.readouterr().out.splitlines()[1]
    assert root.split()[-4:-1] == ["-", "-", "-"]


def test_make_says_what_was_made_and_then_that_nothing_is_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["make", "--development", "--out", str(tmp_path / "out"), "--sites", "a, b"]
    command += ["--host", "x.org", "::2"]
    assert main(command) == 0
    made = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in made] == [
        "authority", "coordinator", "evaluator", "site a", "site b", "roster", "superlink",
    ]  # fmt: skip
    day = (NOW + datetime.timedelta(days=90)).date()
    assert f"x.org, ::2, until {day}" in made[-1]
    assert main(command) == 0
    assert capsys.readouterr().out == "nothing to do\n"


def test_misuse_ends_with_2_and_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["make", "--development", "--out", str(tmp_path / "out")]
    assert main([*command, "--sites", "a,superlink"]) == 2
    assert capsys.readouterr().err.startswith("error: 'superlink' is the name of a part")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2


def test_verifying_an_empty_folder_ends_with_1_and_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "certs", "verify", "--out", str(tmp_path)]
    root = Path(__file__).parents[2]
    plain = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert plain.returncode == 1
    assert plain.stderr == (
        f"error: {tmp_path} holds no certificate authority; make the keys first.\n"
    )
    command.insert(3, "--debug")
    debug = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr


def test_every_command_prints_one_json_document_when_asked(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {
        "make --sites a,b": {"made"},
        "verify": {"rows", "warnings", "problems"},
        "rotate": {"rotated", "enrolled"},
        "rollover": {"name", "rotated", "following", "enrolled"},
        "revoke --site b": {"site", "serials", "moment", "anew"},
    }
    for command, expected in keys.items():
        assert main([*command.split(), "--out", str(damaged), "--json"]) == 0
        assert set(json.loads(capsys.readouterr().out)) == expected
    (damaged / "superlink" / "current" / "crl.pem").unlink()
    assert main(["verify", "--out", str(damaged), "--json"]) == 1
    assert "crl.pem" in json.loads(capsys.readouterr().out)["problems"][0]


def test_a_root_key_with_a_passphrase_has_its_mode_checked(tmp_path: Path) -> None:
    make_all(tmp_path, ["a"], passphrase=b"correct horse battery")
    assert inspect_all(tmp_path).problems == []
    (tmp_path / "authority" / "ca.key").chmod(0o640)
    (problem,) = inspect_all(tmp_path).problems
    assert "ca.key has mode 0640" in problem


def test_a_certificate_that_the_running_superlink_refuses_is_a_problem(
    damaged: Path, tmp_path: Path
) -> None:
    make_all(tmp_path / "other", ["a"])
    with superlink(damaged) as port:
        assert inspect_all(damaged, connect=("localhost", port)).problems == []
        for name in ("client.key", "client.crt"):
            theirs = tmp_path / "other" / "sites" / "a" / "current" / name
            shutil.copy2(theirs, damaged / "sites" / "a" / "current" / name)
        report = inspect_all(damaged, connect=("localhost", port))
    lives = {row.name: row.live == row.serial for row in report.rows if row.serial}
    assert (lives["site a"], lives["site b"], lives["superlink"]) == (False, True, True)
    assert any("refuses the certificate" in one for one in report.problems)
