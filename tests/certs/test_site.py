"""Making keys: what is written, with which modes, and what a second call leaves alone."""

from __future__ import annotations

import datetime
import json
import os
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from certs.authority import read_authority
from certs.files import CertificateError, MisuseError, read_certificates, read_signing_key
from certs.inspection import inspect_all
from certs.names import list_names
from certs.roster import encode_signing, read_roster
from certs.site import make_all

SITE_FILES = {
    "client.key",
    "client.crt",
    "ca.crt",
    "signing.key",
    "supernode.key",
    "supernode.pub",
    "coordinator.pub",
}


def _contents(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()
    }


def _purpose(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def test_each_party_gets_its_own_folder_behind_a_link(federation: Path) -> None:
    assert {path.name for path in federation.iterdir()} == {
        "authority", "superlink", "coordinator", "evaluator", "sites",
    }  # fmt: skip
    for site in ("a", "b"):
        link = federation / "sites" / site / "current"
        assert link.readlink() == Path("v1")
        assert {path.name for path in link.iterdir()} == SITE_FILES
    link = federation / "superlink" / "current"
    assert link.readlink() == Path("v1")
    assert {path.name for path in link.iterdir()} == {
        "server.key", "server.crt", "ca.crt", "root.crt",
        "crl.pem", "coordinator.pub", "roster.json", "roster.sig",
    }  # fmt: skip


def test_private_keys_are_for_their_owner_only_and_the_rest_is_readable(tmp_path: Path) -> None:
    for name, mask in (("strict", 0o077), ("open", 0o000)):
        before = os.umask(mask)
        try:
            make_all(tmp_path / name, ["a"])
        finally:
            os.umask(before)
        modes = {
            path: stat.S_IMODE(path.stat().st_mode)
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        keys = {path for path in modes if path.suffix == ".key"}
        # root, two issuing authorities, SuperLink, coordinator, evaluator; three of the site
        assert len(keys) == 9
        assert {modes[path] for path in keys} == {0o600}
        assert {modes[path] for path in modes.keys() - keys} == {0o644}


def test_a_leaf_has_one_purpose_its_names_and_ninety_days(tmp_path: Path) -> None:
    now = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
    make_all(tmp_path, ["a"], ["10.0.0.7"], now=now)
    server, server_authority = read_certificates(tmp_path / "superlink/current/server.crt")
    client, sites_authority = read_certificates(tmp_path / "sites/a/current/client.crt")
    assert list_names(server) == ["localhost", "127.0.0.1", "::1", "superlink", "10.0.0.7"]
    assert list_names(client) == ["urn:fedqlora:site:a"]
    assert _purpose(server) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert _purpose(client) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert {one.not_valid_after_utc for one in (server, client)} == {
        datetime.datetime(2030, 4, 1, tzinfo=datetime.UTC)
    }
    authority = read_authority(tmp_path / "authority")
    assert authority.root.not_valid_after_utc.year == 2039
    assert [server_authority, sites_authority] == [
        authority.server.certificate,
        authority.sites.certificate,
    ]


def test_a_leaf_does_not_outlive_its_authority(tmp_path: Path) -> None:
    start = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
    make_all(tmp_path, ["a"], now=start)
    make_all(tmp_path, ["b"], now=start + datetime.timedelta(days=1095 - 10))
    leaf, authority = read_certificates(tmp_path / "sites/b/current/client.crt")
    assert leaf.not_valid_after_utc == authority.not_valid_after_utc


# The command line that Flower builds on calls a part of click that warns of its removal.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flower_reads_the_supernode_keys(federation: Path) -> None:
    from flwr.cli.supernode.register import try_load_public_key

    folder = federation / "sites" / "a" / "current"
    private = serialization.load_ssh_private_key((folder / "supernode.key").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    expected = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert try_load_public_key(folder / "supernode.pub") == expected


def test_a_second_call_makes_nothing_and_changes_nothing(damaged: Path) -> None:
    before = _contents(damaged)
    assert make_all(damaged, ["a", "b"]) == []
    assert make_all(damaged, ["a"], ["FED.example.org"]) == []
    assert _contents(damaged) == before


def test_a_new_site_is_added_to_the_roster_and_the_others_stay(damaged: Path) -> None:
    before = _contents(damaged)
    made = make_all(damaged, ["c"])
    assert [line.split(":")[0] for line in made] == ["site c", "roster", "superlink"]
    after = _contents(damaged)
    changed = {name for name in before if before[name] != after[name]}
    assert (damaged / "superlink" / "current").readlink() == Path("v2")
    for name in ("roster.json", "roster.sig"):
        assert after[f"superlink/v2/{name}"] == after[f"coordinator/{name}"]
    for name in ("server.key", "server.crt", "ca.crt", "root.crt", "coordinator.pub"):
        assert after[f"superlink/v2/{name}"] == before[f"superlink/v1/{name}"]
    assert changed == {"coordinator/roster.json", "coordinator/roster.sig"}
    key = read_signing_key(damaged / "coordinator" / "signing.key").public_key()
    assert set(read_roster(damaged / "coordinator", key).sites) == {"a", "b", "c"}


def test_the_root_key_may_be_kept_elsewhere(damaged: Path) -> None:
    (damaged / "authority" / "ca.key").unlink()
    assert make_all(damaged, ["c"])
    assert not (damaged / "authority" / "ca.key").exists()


def test_an_interruption_before_the_roster_is_made_good(damaged: Path) -> None:
    expected = _contents(damaged)
    (damaged / "coordinator" / "roster.sig").unlink()
    assert [line.split(":")[0] for line in make_all(damaged, ["a"])] == ["roster"]
    (damaged / "coordinator" / "roster.sig").unlink()
    (damaged / "coordinator" / "roster.json").unlink()
    assert [line.split(":")[0] for line in make_all(damaged, ["a"])] == ["roster"]
    # Ed25519 signs the same bytes the same way: the same keys give the same files.
    assert _contents(damaged) == expected


def test_a_folder_without_a_revocation_list_gets_one_in_a_new_version(damaged: Path) -> None:
    # As an earlier version of this code made it: no list, no roster, a text for the TLS key.
    folder = damaged / "superlink" / "v1"
    for name in ("crl.pem", "coordinator.pub", "roster.json", "roster.sig"):
        (folder / name).unlink()
    key = read_signing_key(damaged / "coordinator" / "signing.key")
    fields = json.loads((damaged / "coordinator" / "roster.json").read_text())
    for keys in fields["sites"].values():
        (keys["tls"],) = keys["tls"]
    content = json.dumps(fields, indent=2, sort_keys=True).encode() + b"\n"
    (damaged / "coordinator" / "roster.json").write_bytes(content)
    signature = key.sign(b"fedqlora roster v1\n" + content).hex() + "\n"
    (damaged / "coordinator" / "roster.sig").write_text(signature)
    before = _contents(damaged)
    made = make_all(damaged, ["a", "b"], ["fed.example.org"])
    assert [line.split(":")[0] for line in made] == ["superlink"]
    after = _contents(damaged)
    assert {name for name in before if after[name] != before[name]} <= {
        "coordinator/roster.json", "coordinator/roster.sig",
    }  # fmt: skip
    assert {name.removeprefix("superlink/v2/") for name in after.keys() - before.keys()} == {
        "server.key", "server.crt", "ca.crt", "root.crt",
        "crl.pem", "coordinator.pub", "roster.json", "roster.sig",
    }  # fmt: skip
    assert inspect_all(damaged).problems == []
    assert make_all(damaged, ["a", "b"], ["fed.example.org"]) == []


def test_a_revocation_list_is_renewed_after_two_thirds_of_its_time(damaged: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    assert make_all(damaged, ["a"], now=now + datetime.timedelta(days=19)) == []
    later = now + datetime.timedelta(days=21)
    assert inspect_all(damaged, now=later).warnings
    assert [line.split(":")[0] for line in make_all(damaged, ["a"], now=later)] == ["superlink"]
    assert inspect_all(damaged, now=later).warnings == []


@pytest.mark.parametrize(
    "name", ["", "A", "-a", "a_b", "a/b", "..", "a\n", "x" * 33, "evaluator", "authority"]
)
def test_a_name_that_cannot_be_a_site_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(MisuseError):
        make_all(tmp_path / "out", ["a", name])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("host", ["", "a b", "-x", "ä.org", "10.0.0.7/24"])
def test_a_name_that_cannot_be_a_host_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(MisuseError, match="correct --host"):
        make_all(tmp_path / "out", ["a"], [host])
    assert not (tmp_path / "out").exists()


def test_a_host_that_the_existing_certificate_lacks_is_refused(damaged: Path) -> None:
    before = _contents(damaged)
    with pytest.raises(MisuseError, match=r"not valid for new\.example\.org"):
        make_all(damaged, ["c"], ["new.example.org"])
    assert _contents(damaged) == before


@pytest.mark.parametrize("lost", ["authority", "coordinator", "evaluator", "sites/a"])
def test_nothing_is_built_on_a_set_of_keys_that_lost_a_part(damaged: Path, lost: str) -> None:
    (damaged / lost).rename(damaged.parent / "lost")
    before = _contents(damaged)
    with pytest.raises(CertificateError, match="restore"):
        make_all(damaged, ["a", "b", "c"])
    assert _contents(damaged) == before


def test_an_altered_roster_is_not_signed_again(damaged: Path, federation: Path) -> None:
    roster = damaged / "coordinator" / "roster.json"
    key = read_signing_key(federation / "sites" / "b" / "current" / "signing.key")
    old = encode_signing(key.public_key())
    roster.write_text(roster.read_text().replace(old, "00" * 32))
    before = _contents(damaged)
    with pytest.raises(CertificateError, match="not signed by the coordinator"):
        make_all(damaged, ["a", "c"])
    assert _contents(damaged) == before


def test_a_folder_that_cannot_be_written_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CertificateError, match="cannot be written"):
        make_all(tmp_path / "file" / "out", ["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
