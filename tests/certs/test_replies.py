"""Hostile replies: what a site refuses to put in use, and that it then changes nothing."""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from certs.acceptance import accept_reply
from certs.authority import issue_server, issue_site, make_authority, read_authority
from certs.bundle import encode_bundle, encode_json, encode_signature
from certs.files import (
    CertificateError,
    MisuseError,
    encode_certificates,
    read_signing_key,
    read_tls_key,
)
from certs.reply import CONTEXT
from certs.roster import read_roster, sign_roster
from certs.rotation import rotate
from certs.signing import sign_request
from tests.certs.sites import apply, confirm, renew

NOW = datetime.datetime.now(datetime.UTC)


def snapshot(folder: Path) -> dict[Path, bytes | Path]:
    return {
        path: path.readlink() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@dataclass
class Mail:
    """A good reply on its way to a site, which whoever holds a key can rewrite."""

    out: Path
    home: Path
    reply: Path

    def rewrite(self, *, signer: ed25519.Ed25519PrivateKey | None = None, **changes: Any) -> Path:
        """The reply with other files or fields, signed with the coordinator's or another key."""
        files = dict(_members(self.reply.read_bytes()))
        fields = json.loads(files.pop("manifest.json"))
        del files["signature"]
        for name, value in changes.items():
            if name in fields:
                fields[name] = value
            else:
                files[name.replace("_", ".")] = value
        fields["files"] = {
            name: hashlib.sha256(content).hexdigest() for name, content in files.items()
        }
        manifest = encode_json(fields)
        key = signer or read_signing_key(self.out / "coordinator" / "signing.key")
        signature = encode_signature(key.sign(CONTEXT + manifest))
        path = self.home.with_name("rewritten.reply.tar")
        path.write_bytes(
            encode_bundle({"manifest.json": manifest, **files, "signature": signature})
        )
        return path

    def refuse(self, path: Path, reason: str) -> None:
        """The site refuses a reply in one sentence, and then takes the good one."""
        before = snapshot(self.home)
        with pytest.raises(CertificateError, match=reason) as caught:
            accept_reply(self.home, path)
        assert "\n" not in str(caught.value)
        assert snapshot(self.home) == before
        assert accept_reply(self.home, self.reply).anew


def _members(content: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {one.name: file.read() for one in archive if (file := archive.extractfile(one))}


@pytest.fixture
def mail(damaged: Path, tmp_path: Path) -> Mail:
    home = tmp_path / "h"
    signed = sign_request(damaged, apply(damaged, home).path, confirm)
    return Mail(damaged, home, signed.reply)


def own_key(home: Path) -> ec.EllipticCurvePublicKey:
    return read_tls_key(home / "request" / "client.key").public_key()


def test_a_reply_that_was_signed_again_without_a_change_is_accepted(mail: Mail) -> None:
    assert accept_reply(mail.home, mail.rewrite()).anew


def test_a_reply_of_another_coordinator_is_refused(mail: Mail) -> None:
    stranger = ed25519.Ed25519PrivateKey.generate()
    mail.refuse(mail.rewrite(signer=stranger), "not signed by the coordinator")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"request": "0" * 64}, "does not answer the request"),
        ({"site": "a"}, "does not answer the request"),
        ({"kind": "request"}, "not the coordinator's reply"),
        ({"number": "9"}, "truncated or damaged"),
        ({"client_crt": b"garbage"}, "holds no certificates"),
        ({"ca_crt": b""}, "holds no certificates"),
        ({"coordinator_pub": b"garbage"}, "not the coordinator's reply"),
        ({"roster_json": b"{}"}, "not signed by the coordinator's key"),
    ],
)
def test_a_reply_with_one_thing_changed_is_refused(
    mail: Mail, changes: dict[str, object], reason: str
) -> None:
    mail.refuse(mail.rewrite(**changes), reason)


def _chain(leaf: x509.Certificate, issuer: x509.Certificate) -> bytes:
    return encode_certificates(leaf, issuer)


def _other_key(mail: Mail) -> bytes:
    sites = read_authority(mail.out / "authority").sites
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return _chain(issue_site(sites, key, "h", NOW), sites.certificate)


def _other_name(mail: Mail) -> bytes:
    sites = read_authority(mail.out / "authority").sites
    return _chain(issue_site(sites, own_key(mail.home), "a", NOW), sites.certificate)


def _ended(mail: Mail) -> bytes:
    sites = read_authority(mail.out / "authority").sites
    then = NOW - datetime.timedelta(days=91)
    return _chain(issue_site(sites, own_key(mail.home), "h", then), sites.certificate)


def _server(mail: Mail) -> bytes:
    issuer = read_authority(mail.out / "authority").server
    leaf = issue_server(issuer, own_key(mail.home), ["localhost"], NOW)
    return _chain(leaf, issuer.certificate)


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (_other_key, "not for this site's TLS key"),
        (_other_name, "not valid now for site h"),
        (_ended, "not valid now for site h"),
        (_server, "not valid now for site h"),
    ],
)
def test_a_certificate_that_is_not_this_sites_is_refused(
    mail: Mail, forge: Callable[[Mail], bytes], reason: str
) -> None:
    mail.refuse(mail.rewrite(client_crt=forge(mail)), reason)


def test_a_reply_does_not_replace_every_root(mail: Mail, tmp_path: Path) -> None:
    other = make_authority(tmp_path / "other", NOW)
    leaf = issue_site(other.sites, own_key(mail.home), "h", NOW)
    changes = {
        "client_crt": _chain(leaf, other.sites.certificate),
        "ca_crt": encode_certificates(other.root),
    }
    mail.refuse(mail.rewrite(**changes), "replaces every root")


def test_a_roster_with_another_key_for_this_site_is_refused(mail: Mail) -> None:
    key = read_signing_key(mail.out / "coordinator" / "signing.key")
    roster = read_roster(mail.out / "coordinator", key.public_key())
    other = replace(roster.sites["h"], signing=roster.sites["a"].signing)
    forged = sign_roster(replace(roster, sites={**roster.sites, "h": other}), key)
    changes = {name.replace(".", "_"): content for name, content in forged.items()}
    mail.refuse(mail.rewrite(**changes), "other keys for site h")


def test_an_older_reply_is_refused(mail: Mail, tmp_path: Path) -> None:
    older = shutil.copy2(mail.reply, tmp_path / "older.reply.tar")
    assert accept_reply(mail.home, older).anew
    rotate(mail.out)
    assert accept_reply(mail.home, mail.reply).anew
    before = snapshot(mail.home)
    with pytest.raises(CertificateError, match="is older than"):
        accept_reply(mail.home, older)
    assert snapshot(mail.home) == before


def test_the_reply_to_an_earlier_request_does_not_answer_a_later_one(
    mail: Mail, tmp_path: Path
) -> None:
    accept_reply(mail.home, mail.reply)
    older = shutil.copy2(mail.reply, tmp_path / "older.reply.tar")
    signed = renew(mail.out, mail.home)
    # Before the renewal's reply, the present one is still in use: nothing changes.
    assert not accept_reply(mail.home, older).anew
    assert accept_reply(mail.home, signed.reply).anew
    with pytest.raises(CertificateError, match="does not answer the request"):
        accept_reply(mail.home, older)


@pytest.mark.parametrize("spoil", [lambda content: content[:3000], lambda _: b"garbage"])
def test_a_truncated_reply_is_refused(
    mail: Mail, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "cut.reply.tar"
    path.write_bytes(spoil(mail.reply.read_bytes()))
    mail.refuse(path, "truncated or damaged|lacks")


def test_a_reply_where_nothing_was_requested_is_misuse(mail: Mail, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="holds no request"):
        accept_reply(tmp_path / "elsewhere", mail.reply)
