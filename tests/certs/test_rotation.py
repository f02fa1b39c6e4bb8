"""Rotation: new leaves that both sides accept at once, and what the roster accepts meanwhile."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from certs.__main__ import main
from certs.crl import list_revoked, read_lists
from certs.files import CertificateError, MisuseError, read_certificates, read_signing_key
from certs.inspection import inspect_all
from certs.names import list_names
from certs.renewal import format_serial
from certs.roster import Roster, encode_tls, read_roster
from certs.rotation import rotate
from certs.site import make_all
from fedqlora.tls import load_identity
from tests.certs.peers import call_as_site, serving_folder, superlink

NOW = datetime.datetime.now(datetime.UTC)


def _roster(out: Path) -> Roster:
    key = read_signing_key(out / "coordinator" / "signing.key").public_key()
    roster = read_roster(out / "coordinator", key)
    assert read_roster(out / "superlink" / "current", key) == roster
    return roster


def _tls(out: Path, site: str, version: str = "current") -> str:
    leaf = read_certificates(out / "sites" / site / version / "client.crt")[0]
    return encode_tls(leaf.public_key())  # type: ignore[arg-type]


def _revoked(out: Path) -> set[int]:
    issuers = read_certificates(out / "superlink" / "current" / "ca.crt")
    return set(list_revoked(read_lists(out / "superlink" / "current" / "crl.pem", issuers)))


def test_all_leaves_are_new_and_everybody_still_connects(damaged: Path) -> None:
    rotated = rotate(damaged)
    assert [one.name for one in rotated] == ["superlink", "sites/a", "sites/b"]
    assert len({serial for one in rotated for serial in (one.old_serial, one.new_serial)}) == 6
    for one in rotated:
        file = "server.crt" if one.name == "superlink" else "client.crt"
        for version, serial in (("v1", one.old_serial), ("current", one.new_serial)):
            assert (
                format_serial(read_certificates(damaged / one.name / version / file)[0]) == serial
            )
    old, new = (
        read_certificates(damaged / "superlink" / version / "server.crt")[0]
        for version in ("v1", "current")
    )
    assert list_names(new) == list_names(old)
    assert new.public_key() != old.public_key()
    assert inspect_all(damaged).problems == []
    load_identity(damaged / "superlink", "server")
    load_identity(damaged / "sites" / "a", "client")
    with superlink(damaged) as port:
        assert call_as_site(port, damaged, "a")["peer_uri"] == "urn:fedqlora:site:a"


def test_supernode_and_signing_keys_stay(damaged: Path) -> None:
    rotate(damaged)
    folder = damaged / "sites" / "a"
    for name in ("signing.key", "supernode.key", "supernode.pub", "coordinator.pub", "ca.crt"):
        assert (folder / "v1" / name).read_bytes() == (folder / "current" / name).read_bytes()


def test_the_key_before_the_last_rotation_is_accepted_and_the_one_before_it_revoked(
    damaged: Path,
) -> None:
    keys = [_tls(damaged, "a")]
    first = read_certificates(damaged / "sites/a/current/client.crt")[0]
    for _ in range(2):
        rotate(damaged, ["a"], superlink=False)
        keys.insert(0, _tls(damaged, "a"))
        assert _roster(damaged).sites["a"].tls == tuple(keys[:2])
    assert len(set(keys)) == 3
    assert _revoked(damaged) == {first.serial_number}
    assert _roster(damaged).sites["b"].tls == (_tls(damaged, "b"),)
    # What happens to others leaves both keys accepted.
    rotate(damaged, ["b"], superlink=False)
    make_all(damaged, ["c"])
    assert _roster(damaged).sites["a"].tls == tuple(keys[:2])


def test_a_site_with_its_old_leaf_still_connects_after_the_rotation(damaged: Path) -> None:
    rotate(damaged)
    with serving_folder(damaged / "superlink" / "current") as port:
        assert call_as_site(port, damaged, "a", version="v1")["peer_uri"] == "urn:fedqlora:site:a"


def test_only_those_who_are_named_are_rotated(damaged: Path) -> None:
    server = read_certificates(damaged / "superlink" / "current" / "server.crt")[0]
    assert [one.name for one in rotate(damaged, ["b"], superlink=False)] == ["sites/b"]
    assert read_certificates(damaged / "superlink" / "current" / "server.crt")[0] == server
    assert (damaged / "sites" / "a" / "current").readlink() == Path("v1")
    assert [one.name for one in rotate(damaged, [], hosts=["new.example.org"])] == ["superlink"]
    server = read_certificates(damaged / "superlink" / "current" / "server.crt")[0]
    assert list_names(server)[-2:] == ["fed.example.org", "new.example.org"]
    assert (damaged / "sites" / "a" / "current").readlink() == Path("v1")


def test_three_versions_are_kept(damaged: Path) -> None:
    for _ in range(4):
        rotate(damaged, ["a"], superlink=False)
    for folder in (damaged / "superlink", damaged / "sites" / "a"):
        assert sorted(path.name for path in folder.iterdir()) == ["current", "v3", "v4", "v5"]


def test_the_root_key_is_not_needed(damaged: Path) -> None:
    (damaged / "authority" / "ca.key").unlink()
    assert rotate(damaged)


def test_rotation_lengthens_what_was_due(tmp_path: Path) -> None:
    make_all(tmp_path, ["a"], now=NOW - datetime.timedelta(days=61))
    warnings = [one for one in inspect_all(tmp_path).warnings if one.endswith("run rotate.")]
    assert len(warnings) == 2
    rotate(tmp_path)
    report = inspect_all(tmp_path)
    assert (report.warnings, report.problems) == ([], [])


def test_an_unknown_site_is_misuse_and_changes_nothing(damaged: Path) -> None:
    with pytest.raises(MisuseError, match="'z' is not among"):
        rotate(damaged, ["a", "z"])
    assert (damaged / "sites" / "a" / "current").readlink() == Path("v1")


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("authority/sites.key", b"garbage"),
        ("authority/sites.crt", None),
        ("coordinator/signing.key", b""),
        ("coordinator/roster.json", b"{}"),
        ("superlink/current/server.crt", b"garbage"),
        ("superlink/current/crl.pem", b"garbage"),
        ("superlink/current/crl.pem", b""),
        ("sites/b/current/client.crt", b"garbage"),
    ],
)
def test_a_garbled_file_is_one_error_and_changes_nothing(
    damaged: Path, path: str, content: bytes | None
) -> None:
    (damaged / path).unlink()
    if content is not None:
        (damaged / path).write_bytes(content)
    with pytest.raises(CertificateError, match=path.rsplit("/", 1)[1]):
        rotate(damaged)
    for folder in ("superlink", "sites/a", "sites/b"):
        assert (damaged / folder / "current").readlink() == Path("v1")


def test_a_revocation_list_of_a_stranger_is_refused(damaged: Path, tmp_path: Path) -> None:
    make_all(tmp_path / "other", ["a"])
    stranger = (tmp_path / "other" / "superlink" / "current" / "crl.pem").read_bytes()
    (damaged / "superlink" / "current" / "crl.pem").write_bytes(stranger)
    with pytest.raises(CertificateError, match="no sites authority has signed"):
        rotate(damaged)
    assert any("no sites authority has signed" in one for one in inspect_all(damaged).problems)


def test_the_command_proves_the_new_serial_by_a_handshake(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with superlink(damaged, follow=True) as port:
        command = ["rotate", "--out", str(damaged), "--connect", f"localhost:{port}"]
        assert main(command) == 0
        serial = format_serial(read_certificates(damaged / "superlink/current/server.crt")[0])
        assert capsys.readouterr().out.splitlines()[-1] == (
            f"live: localhost:{port} serves serial {serial}"
        )
        assert main(["verify", *command[1:]]) == 0
        table = capsys.readouterr().out.splitlines()
        row = next(line for line in table if line.startswith("superlink "))
        assert row.split()[-2:] == [serial, serial]


def test_a_superlink_that_keeps_its_certificate_ends_the_command_with_1(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with superlink(damaged) as port:
        address = ["--connect", f"localhost:{port}"]
        command = ["rotate", "--out", str(damaged), "--patience-seconds", "1", *address]
        assert main(command) == 1
        assert "still serves serial" in capsys.readouterr().err
        assert main(["verify", "--out", str(damaged), *address]) == 1
        assert "problem: The running SuperLink serves serial" in capsys.readouterr().out


def test_nobody_at_the_address_ends_the_command_with_1_and_a_bad_address_with_2(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["rotate", "--out", str(damaged), "--patience-seconds", "0", "--connect"]
    assert main([*command, "localhost:1"]) == 1
    assert "does not complete a handshake" in capsys.readouterr().err
    links = (damaged / "superlink" / "current").readlink()
    assert main([*command, "localhost"]) == 2
    assert (damaged / "superlink" / "current").readlink() == links
