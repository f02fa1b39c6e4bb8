"""Enrolment from a site's request to its working keys, and what becomes of such a site later."""

from __future__ import annotations

import base64
import datetime
import io
import json
import shutil
import stat
import sys
from pathlib import Path

import pytest

from certs.__main__ import main
from certs.acceptance import accept_reply
from certs.application import make_request
from certs.change import CHANGE_FILE
from certs.files import (
    CertificateError,
    MisuseError,
    read_certificates,
    read_signing_key,
    read_supernode_key,
    read_tls_key,
)
from certs.inspection import inspect_all
from certs.renewal import format_serial
from certs.revocation import revoke
from certs.rollover import read_stage, roll_over
from certs.rotation import rotate
from certs.signing import sign_request
from certs.site import make_all
from tests.certs.peers import call, superlink
from tests.certs.sites import apply, confirm, enrol, give_trust, renew

SUPERNODE_FILES = {"client.key", "client.crt", "ca.crt", "supernode.key", "supernode.pub"}
TRAINER_FILES = {"signing.key", "coordinator.pub", "roster.json", "roster.sig"}


def snapshot(folder: Path) -> dict[Path, bytes | Path]:
    """All that a folder holds: contents of files, and where links point."""
    return {
        path: path.readlink() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def connect(port: int, home: Path) -> dict[str, str]:
    """Call a SuperLink with what a site has accepted."""
    folder = home / "supernode" / "current"
    files = ((folder / name).read_bytes() for name in ("ca.crt", "client.key", "client.crt"))
    return call(port, *files)


def test_a_site_makes_its_keys_and_both_sides_see_one_fingerprint(
    damaged: Path, tmp_path: Path
) -> None:
    home = tmp_path / "h"
    application = apply(damaged, home)
    for name in ("client.key", "supernode.key", "signing.key"):
        assert stat.S_IMODE((home / "request" / name).stat().st_mode) == 0o600
    seen = []
    signed = sign_request(damaged, application.path, lambda one: seen.append(one.fingerprint))
    assert seen == [application.request.fingerprint] == [signed.fingerprint]
    accepted = accept_reply(home, signed.reply)
    assert {one.name for one in (home / "supernode/current").iterdir()} >= SUPERNODE_FILES
    assert {one.name for one in (home / "trainer/current").iterdir()} == TRAINER_FILES
    assert not (home / "request").exists()
    assert set(accepted.peers) == {"a", "b"}
    report = inspect_all(damaged)
    assert (report.problems, report.warnings) == ([], [])
    modes = {row.name: row.mode for row in report.rows}
    assert {modes[f"site h{kind}"] for kind in ("", " supernode", " signing")} == {"-"}
    with superlink(damaged) as port:
        assert connect(port, home)["x509_subject_alternative_name"] == "urn:fedqlora:site:h"


def test_no_byte_of_a_private_key_leaves_the_site(damaged: Path, tmp_path: Path) -> None:
    enrol(damaged, home := tmp_path / "h")
    renew(damaged, home)
    keys = home / "request"
    secrets = [
        read_tls_key(keys / "client.key").private_numbers().private_value.to_bytes(32, "big"),
        read_supernode_key(keys / "supernode.key")
        .private_numbers()
        .private_value.to_bytes(48, "big"),
        read_signing_key(keys / "signing.key").private_bytes_raw(),
    ]
    request = (home / "h.request.tar").read_bytes()
    centre = [path.read_bytes() for path in damaged.rglob("*") if path.is_file()]
    for secret in secrets:
        text = base64.b64encode(secret)
        # Any eight bytes of a key, in any of the spellings that a file of text could have.
        for start in range(len(secret) - 8):
            piece = secret[start : start + 8]
            for spelling in (piece, piece.hex().encode(), text[start : start + 11]):
                assert spelling not in request
        assert not any(secret in content for content in centre)
    for name in ("client.key", "supernode.key", "signing.key"):
        assert (keys / name).read_bytes().splitlines()[-2] not in request
        assert not list((damaged / "sites" / "h").rglob(name))


def test_a_rerun_prints_the_same_and_makes_nothing_anew(damaged: Path, tmp_path: Path) -> None:
    home = tmp_path / "h"
    first = apply(damaged, home)
    before = snapshot(home)
    again = apply(damaged, home)
    assert (again.anew, again.request) == (False, first.request)
    assert snapshot(home) == before
    # An interruption between the keys and the copy that is sent.
    first.path.unlink()
    assert apply(damaged, home).path.read_bytes() == first.request.content
    signed = sign_request(damaged, first.path, confirm)
    centre = snapshot(damaged)
    repeated = sign_request(damaged, first.path, confirm)
    assert (signed.anew, repeated.anew) == (True, False)
    assert snapshot(damaged) == centre
    assert accept_reply(home, signed.reply).anew
    site = snapshot(home)
    assert not accept_reply(home, signed.reply).anew
    assert apply(damaged, home).request == first.request
    assert snapshot(home) == site


def test_a_folder_serves_one_site_and_one_trust(damaged: Path, tmp_path: Path) -> None:
    home = tmp_path / "h"
    apply(damaged, home)
    before = snapshot(home)
    with pytest.raises(MisuseError, match="keys of site h"):
        apply(damaged, home, "i")
    make_all(tmp_path / "other", ["a"])
    with pytest.raises(CertificateError, match="another trust"):
        make_request(home, "h", give_trust(tmp_path / "other", tmp_path / "theirs"))
    assert snapshot(home) == before


def test_a_renewal_changes_the_tls_key_alone_and_loses_no_connection(
    damaged: Path, tmp_path: Path
) -> None:
    home = tmp_path / "h"
    enrol(damaged, home)
    old = {path.name: path.read_bytes() for path in (home / "supernode/current").iterdir()}
    signing = (home / "trainer/current/signing.key").read_bytes()
    with superlink(damaged, follow=True) as port:
        signed = renew(damaged, home)
        # Signed and not accepted yet: the site still works with its old key.
        assert connect(port, home)["x509_subject_alternative_name"] == "urn:fedqlora:site:h"
        assert inspect_all(damaged).problems == []
        assert accept_reply(home, signed.reply).anew
        assert connect(port, home)["x509_subject_alternative_name"] == "urn:fedqlora:site:h"
    new = {path.name: path.read_bytes() for path in (home / "supernode/current").iterdir()}
    changed = {name for name in new if new[name] != old[name]}
    assert changed == {"client.key", "client.crt", "request.tar", "reply.json"}
    assert (home / "trainer/current/signing.key").read_bytes() == signing
    assert (home / "supernode/current").readlink() == Path("v2")
    assert inspect_all(damaged).problems == []


def test_a_renewal_before_a_first_reply_is_misuse(damaged: Path, tmp_path: Path) -> None:
    apply(damaged, tmp_path / "h")
    with pytest.raises(MisuseError, match="no accepted reply"):
        renew(damaged, tmp_path / "h")


def test_rotation_passes_such_a_site_by_and_says_so(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enrol(damaged, tmp_path / "h")
    leaf = (damaged / "sites/h/current/client.crt").read_bytes()
    assert main(["rotate", "--out", str(damaged)]) == 0
    assert "sites/h: not rotated, keeps its own keys" in capsys.readouterr().out
    assert (damaged / "sites/h/current/client.crt").read_bytes() == leaf
    with pytest.raises(MisuseError, match="keeps its own keys"):
        rotate(damaged, ["a", "h"])
    assert inspect_all(damaged).problems == []


def test_such_a_site_goes_through_a_rollover_with_its_own_keys(
    damaged: Path, tmp_path: Path
) -> None:
    home, reply = tmp_path / "h", damaged / "replies" / "h.reply.tar"
    enrol(damaged, home)
    key = (home / "supernode/current/client.key").read_bytes()
    with superlink(damaged, follow=True) as port:
        for stage in ("trust", "switch"):
            assert roll_over(damaged).name == stage
            # With what it had before, and with what it is sent.
            assert connect(port, home)
            assert accept_reply(home, reply).anew
            assert connect(port, home)
            assert inspect_all(damaged).problems == []
        leaf = read_certificates(home / "supernode/current/client.crt")[0]
        assert leaf.issuer.rfc4514_string() == "CN=fedqlora sites authority 2"
        with pytest.raises(CertificateError, match="--accepted h"):
            roll_over(damaged)
        with pytest.raises(MisuseError, match="correct --accepted"):
            roll_over(damaged, accepted=["a"])
        assert read_stage(damaged) == "retire"
        assert roll_over(damaged, accepted=["h"]).name == "retire"
        assert connect(port, home)
        assert accept_reply(home, reply).anew
        assert connect(port, home)
    assert (home / "supernode/current/client.key").read_bytes() == key
    assert len(read_certificates(home / "supernode/current/ca.crt")) == 1
    assert inspect_all(damaged).problems == []


def test_a_site_that_missed_a_rollover_keeps_its_old_root(damaged: Path, tmp_path: Path) -> None:
    home, reply = tmp_path / "h", damaged / "replies" / "h.reply.tar"
    enrol(damaged, home)
    for _ in range(3):
        roll_over(damaged, force=True)
    before = snapshot(home)
    with pytest.raises(CertificateError, match="replaces every root"):
        accept_reply(home, reply)
    assert snapshot(home) == before


def test_a_revoked_site_loses_its_reply_and_its_place_in_the_roster(
    damaged: Path, tmp_path: Path
) -> None:
    enrol(damaged, tmp_path / "h")
    serial = format_serial(read_certificates(damaged / "sites/h/current/client.crt")[0])
    assert revoke(damaged, "h").serials == [serial]
    assert not (damaged / "replies").exists()
    assert inspect_all(damaged).problems == []
    # The others are told: their replies follow the roster.
    assert set(enrol(damaged, tmp_path / "i", "i").peers) == {"a", "b"}


def test_another_admission_reaches_a_site_with_its_next_reply(
    damaged: Path, tmp_path: Path
) -> None:
    home = tmp_path / "h"
    enrol(damaged, home)
    enrol(damaged, tmp_path / "i", "i")
    make_all(damaged, ["a", "b", "c"])
    accepted = accept_reply(home, damaged / "replies" / "h.reply.tar")
    assert set(accepted.peers) == {"a", "b", "c", "i"}
    assert (home / "trainer/current").readlink() == Path("v2")


def test_verify_says_that_the_site_has_to_renew(damaged: Path, tmp_path: Path) -> None:
    enrol(damaged, tmp_path / "h")
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=62)
    (warning,) = [one for one in inspect_all(damaged, now=later).warnings if "site h" in one]
    assert warning.endswith("have the site send a request to renew.")


def test_verify_finds_what_was_altered_in_such_a_site(damaged: Path, tmp_path: Path) -> None:
    enrol(damaged, tmp_path / "h")
    folder, reply = damaged / "sites/h/current", damaged / "replies/h.reply.tar"
    shutil.copy2(damaged / "sites/a/current/supernode.pub", folder / "supernode.pub")
    reply.write_bytes(b"garbage")
    problems = inspect_all(damaged).problems
    assert any("are not those of the roster" in one for one in problems)
    assert any("is not up to date" in one for one in problems)
    shutil.copy2(tmp_path / "h/supernode/current/supernode.pub", folder / "supernode.pub")
    make_all(damaged, ["a"])
    assert inspect_all(damaged).problems == []


def test_the_commands_print_one_json_document_and_one_sentence(
    damaged: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home, trust = str(tmp_path / "h"), str(give_trust(damaged, tmp_path / "trust"))

    def run(command: str, *more: str, status: int = 0) -> dict[str, object]:
        assert main([*command.split(), *more, "--json"]) == status
        content: dict[str, object] = json.loads(capsys.readouterr().out)
        return content

    request = ["--site", "h", "--out", home]
    assert "--trust" in str(run("request", *request, status=2)["error"])
    made = run("request", *request, "--trust", trust)
    assert set(made) == {"site", "request", "fingerprint", "anew"}
    renewal = run("request --renew", *request, "--trust", trust, status=2)
    assert "leave out either" in str(renewal["error"])
    sign = ["--out", str(damaged), "--request", str(made["request"])]
    fingerprint = str(made["fingerprint"])
    assert len(fingerprint.replace("-", "")) * 5 >= 100
    wrong = fingerprint[:-1] + ("A" if fingerprint[-1] != "A" else "B")
    before = snapshot(damaged)
    for refused, status in (([], 2), (["--fingerprint", wrong], 1), (["--fingerprint", ""], 1)):
        assert fingerprint in str(run("sign", *sign, *refused, status=status)["error"])
    terminal = io.StringIO("no\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert "not confirmed" in str(run("sign", *sign, status=1)["error"])
    assert snapshot(damaged) == before
    typed = fingerprint.lower().replace("-", " ")
    signed = run("sign", *sign, "--fingerprint", typed)
    assert set(signed) == {"site", "fingerprint", "reply", "serial", "until", "renewal", "anew"}
    assert signed["fingerprint"] == fingerprint
    accepted = run("accept", "--out", home, "--reply", str(signed["reply"]))
    assert set(accepted) == {"site", "supernode", "trainer", "until", "peers", "anew"}
    renewed = run("request --renew", *request)
    # Signed with a key that the roster knows: nobody has to be asked.
    assert run("sign", *sign)["fingerprint"] == renewed["fingerprint"] != fingerprint


def test_a_person_at_a_terminal_confirms_the_fingerprint(
    damaged: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    application = apply(damaged, tmp_path / "h")
    terminal = io.StringIO("yes\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert main(["sign", "--out", str(damaged), "--request", str(application.path)]) == 0
    assert f"fingerprint: {application.request.fingerprint}" in capsys.readouterr().err
    assert not (damaged / CHANGE_FILE).exists()
