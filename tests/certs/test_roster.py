"""The roster: only what the coordinator signed, byte for byte, is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from certs.files import CertificateError, read_signing_key
from certs.roster import CONTEXT, Roster, SiteKeys, encode_signing, read_roster, write_roster

SITE = SiteKeys(signing="11" * 32, supernode="ecdsa-sha2-nistp384 AAAA", tls=("22" * 32, "44" * 32))


@pytest.fixture
def key() -> ed25519.Ed25519PrivateKey:
    """A coordinator's signing key."""
    return ed25519.Ed25519PrivateKey.generate()


def _roster(key: ed25519.Ed25519PrivateKey) -> Roster:
    return Roster(
        coordinator=encode_signing(key.public_key()), evaluator="33" * 32, sites={"a": SITE}
    )


def test_a_written_roster_is_read_back(tmp_path: Path, key: ed25519.Ed25519PrivateKey) -> None:
    write_roster(tmp_path, _roster(key), key)
    assert read_roster(tmp_path, key.public_key()) == _roster(key)
    assert json.loads((tmp_path / "roster.json").read_text()) == {
        "coordinator": key.public_key().public_bytes_raw().hex(),
        "evaluator": {"signing": "33" * 32},
        "sites": {
            "a": {"signing": "11" * 32, "supernode": SITE.supernode, "tls": ["22" * 32, "44" * 32]},
        },
    }


def test_the_signature_covers_a_context_and_the_exact_bytes(federation: Path) -> None:
    folder = federation / "coordinator"
    public = read_signing_key(folder / "signing.key").public_key()
    content = (folder / "roster.json").read_bytes()
    signature = bytes.fromhex((folder / "roster.sig").read_text())
    public.verify(signature, b"fedqlora roster v1\n" + content)


def test_a_roster_signed_by_another_key_is_refused(
    tmp_path: Path, key: ed25519.Ed25519PrivateKey
) -> None:
    write_roster(tmp_path, _roster(key), ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(CertificateError, match="not signed by the coordinator"):
        read_roster(tmp_path, key.public_key())


def test_a_roster_that_names_another_coordinator_is_refused(
    tmp_path: Path, key: ed25519.Ed25519PrivateKey
) -> None:
    write_roster(tmp_path, _roster(ed25519.Ed25519PrivateKey.generate()), key)
    with pytest.raises(CertificateError, match="names another coordinator"):
        read_roster(tmp_path, key.public_key())


def test_a_signature_over_the_bytes_without_the_context_is_refused(
    tmp_path: Path, key: ed25519.Ed25519PrivateKey
) -> None:
    write_roster(tmp_path, _roster(key), key)
    content = (tmp_path / "roster.json").read_bytes()
    (tmp_path / "roster.sig").write_text(key.sign(content).hex())
    with pytest.raises(CertificateError, match="not signed"):
        read_roster(tmp_path, key.public_key())


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"coordinator": "x", "sites": {}}'])
def test_signed_bytes_that_are_no_roster_are_refused(
    tmp_path: Path, key: ed25519.Ed25519PrivateKey, content: bytes
) -> None:
    (tmp_path / "roster.json").write_bytes(content)
    (tmp_path / "roster.sig").write_text(key.sign(CONTEXT + content).hex())
    with pytest.raises(CertificateError, match="is not a roster"):
        read_roster(tmp_path, key.public_key())
