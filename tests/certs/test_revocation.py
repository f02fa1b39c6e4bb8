"""Revocation: what the list and the roster say of a site that may not come any more."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path

import pytest
from cryptography import x509

from certs.__main__ import main
from certs.crl import list_revoked, read_lists
from certs.files import CertificateError, MisuseError, read_certificates, read_signing_key
from certs.inspection import inspect_all
from certs.renewal import format_serial
from certs.revocation import revoke
from certs.roster import read_roster
from certs.rotation import rotate
from certs.site import make_all

NOW = datetime.datetime.now(datetime.UTC)


def _lists(out: Path) -> list[x509.CertificateRevocationList]:
    folder = out / "superlink" / "current"
    return read_lists(folder / "crl.pem", read_certificates(folder / "ca.crt"))


def _sites(out: Path) -> set[str]:
    key = read_signing_key(out / "coordinator" / "signing.key").public_key()
    roster = read_roster(out / "superlink" / "current", key)
    assert roster == read_roster(out / "coordinator", key)
    return set(roster.sites)


def test_every_leaf_of_the_site_is_listed_and_the_roster_lacks_it(damaged: Path) -> None:
    rotate(damaged)
    leaves = [
        read_certificates(damaged / "sites" / "b" / version / "client.crt")[0]
        for version in ("v1", "v2")
    ]
    revocation = revoke(damaged, "b")
    assert revocation.anew
    assert revocation.serials == [format_serial(leaf) for leaf in leaves]
    assert set(list_revoked(_lists(damaged))) == {leaf.serial_number for leaf in leaves}
    assert _sites(damaged) == {"a"}
    report = inspect_all(damaged)
    assert (report.problems, report.warnings) == ([], [])


def test_a_second_call_changes_nothing(damaged: Path) -> None:
    moment = revoke(damaged, "b").moment
    before = {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    again = revoke(damaged, "b")
    assert (again.anew, again.moment) == (False, moment)
    assert before == {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}


def test_neither_make_nor_rotate_brings_a_revoked_site_back(damaged: Path) -> None:
    revoke(damaged, "b")
    assert make_all(damaged, ["a", "b"]) == []
    with pytest.raises(MisuseError):
        rotate(damaged, ["b"])
    assert [one.name for one in rotate(damaged)] == ["superlink", "sites/a"]
    make_all(damaged, ["a", "b", "c"])
    assert _sites(damaged) == {"a", "c"}
    # A lost folder of the SuperLink does not make anybody forget.
    shutil.rmtree(damaged / "superlink")
    make_all(damaged, ["a"])
    assert _sites(damaged) == {"a", "c"}
    leaf = read_certificates(damaged / "sites/b/current/client.crt")[0]
    assert set(list_revoked(_lists(damaged))) == {leaf.serial_number}


def test_a_removed_folder_admits_the_site_anew_with_other_keys(damaged: Path) -> None:
    old = read_certificates(damaged / "sites/b/current/client.crt")[0]
    revoke(damaged, "b")
    shutil.rmtree(damaged / "sites" / "b")
    make_all(damaged, ["b"])
    assert _sites(damaged) == {"a", "b"}
    assert set(list_revoked(_lists(damaged))) == {old.serial_number}
    assert inspect_all(damaged).problems == []


def test_a_list_lasts_thirty_days_and_its_number_grows(damaged: Path) -> None:
    numbers = []
    for moment in (NOW, NOW, NOW - datetime.timedelta(days=1)):
        rotate(damaged, now=moment)
        (one,) = _lists(damaged)
        end = one.next_update_utc
        assert end is not None
        assert abs(end - moment - datetime.timedelta(days=30)) < datetime.timedelta(seconds=2)
        numbers.append(one.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number)
    assert sorted(set(numbers)) == numbers


def test_an_entry_is_dropped_when_its_leaf_must_have_ended(damaged: Path) -> None:
    revoke(damaged, "b", now=NOW)
    for days, count in ((89, 1), (91, 0)):
        # Only to sign a new list: nothing is rotated.
        rotate(damaged, [], superlink=True, now=NOW + datetime.timedelta(days=days))
        assert len(list_revoked(_lists(damaged))) == count


@pytest.mark.parametrize(
    ("days", "warnings", "problems"),
    [(19, 0, 0), (21, 1, 0), (31, 0, 1)],
    ids=["fresh", "due", "ended"],
)
def test_a_list_that_ends_is_a_warning_before_and_a_problem_after(
    tmp_path: Path, days: int, warnings: int, problems: int
) -> None:
    make_all(tmp_path, ["a"], now=NOW)
    report = inspect_all(tmp_path, now=NOW + datetime.timedelta(days=days))
    assert (len(report.warnings), len(report.problems)) == (warnings, problems)


def test_a_site_in_the_roster_whose_leaf_is_listed_is_a_problem(damaged: Path) -> None:
    revoke(damaged, "b")
    (damaged / "sites" / "b" / "revoked.json").unlink()
    problems = inspect_all(damaged).problems
    assert any("site b is on the revocation list" in one for one in problems)


def test_a_roster_that_the_superlink_does_not_have_is_a_problem(
    damaged: Path, federation: Path
) -> None:
    revoke(damaged, "b")
    for name in ("roster.json", "roster.sig"):
        shutil.copy2(federation / "coordinator" / name, damaged / "superlink" / "current" / name)
    assert [one for one in inspect_all(damaged).problems if "is not the coordinator's" in one]
    make_all(damaged, ["a"])
    assert inspect_all(damaged).problems == []


def test_the_keys_of_the_root_and_of_a_garbled_leaf_are_not_needed(damaged: Path) -> None:
    (damaged / "authority" / "ca.key").unlink()
    (damaged / "sites/b/current/client.crt").write_bytes(b"garbage")
    assert revoke(damaged, "b").serials == []
    assert _sites(damaged) == {"a"}


def test_a_garbled_record_is_one_error(damaged: Path) -> None:
    revoke(damaged, "b")
    (damaged / "sites" / "b" / "revoked.json").write_text("garbage")
    with pytest.raises(CertificateError, match="does not say what was revoked"):
        revoke(damaged, "b")


def test_the_command_says_what_it_did_and_refuses_an_unknown_site(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serial = format_serial(read_certificates(damaged / "sites/b/current/client.crt")[0])
    command = ["revoke", "--out", str(damaged), "--site"]
    assert main([*command, "b"]) == 0
    assert capsys.readouterr().out.startswith("site b: revoked, ")
    assert main([*command, "b", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["serials"], printed["anew"]) == ([serial], False)
    for unknown in ("z", "..", ""):
        assert main([*command, unknown]) == 2
        assert "is not among the sites" in capsys.readouterr().err
    assert main([*command, "z", "--json"]) == 2
    assert "is not among the sites" in json.loads(capsys.readouterr().out)["error"]
