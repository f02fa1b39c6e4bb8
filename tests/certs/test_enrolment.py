"""Enrolment from a site's request to its working keys, and what becomes of such a site later."""

from __future__ import annotations

import base64
import stat
from pathlib import Path

from certs.acceptance import accept_reply
from certs.files import (
    read_signing_key,
    read_supernode_key,
    read_tls_key,
)
from certs.inspection import inspect_all
from certs.signing import sign_request
from tests.certs.peers import call, superlink
from tests.certs.sites import apply, confirm, enrol, renew

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
