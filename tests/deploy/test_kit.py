"""The kit: what is in it, that nobody alters it unseen, and that no private key gets in."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import tarfile
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from certs.files import CertificateError, MisuseError
from certs.revocation import revoke
from certs.site import make_all
from client.policy import Policy, check, load_policy
from deploy.archive import Member, refuse_private_keys, write_archive
from deploy.folders import read_settings
from deploy.image import read_image
from deploy.kit import build_kit, choose_superlink, main
from deploy.policy import UNDECIDED, render_policy
from deploy.signature import fingerprint_key, open_kit_key
from fedqlora.config import RunConfig, validate
from fedqlora.errors import PolicyRefusal
from fedqlora.section import Section
from tests.deploy.kits import IMAGE, SUPERLINK, make_federation, make_kit, unpack

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def is_signed(kit: Path) -> bool:
    """What a hospital's own openssl says of the list of sums."""
    command = "openssl dgst -sha256 -verify trust/kit.pub -signature SHA256SUMS.sig SHA256SUMS"
    done = run(*command.split(), cwd=kit)
    return done.returncode == 0 and "Verified OK" in done.stdout


def test_a_kit_holds_what_a_site_needs_and_nothing_else(kit: Path) -> None:
    found = {path.relative_to(kit).as_posix() for path in kit.rglob("*") if path.is_file()}
    assert found == {
        ".env", "README.md", "SHA256SUMS", "SHA256SUMS.sig", "compose.gpu.yml", "compose.yml",
        "data-flow.md", "manifest.json", "policy.toml", "roster/roster.json", "roster/roster.sig",
        "sbom/client.cdx.json", "settings.env", "site", "trust/coordinator.pub", "trust/kit.pub",
        "trust/root.crt",
    }  # fmt: skip
    assert os.access(kit / "site", os.X_OK)
    assert kit.name == "fedqlora-site-a-0.1.0"


def test_openssl_and_sha256sum_accept_archive_and_kit(archive: Path, kit: Path) -> None:
    assert run("sha256sum", "-c", f"{archive.name}.sha256", cwd=archive.parent).returncode == 0
    key = kit / "trust" / "kit.pub"
    verify = ["openssl", "dgst", "-sha256", "-verify", key, "-signature", f"{archive.name}.sig"]
    assert run(*verify, archive.name, cwd=archive.parent).stdout.strip() == "Verified OK"
    assert is_signed(kit)
    done = run("sha256sum", "--strict", "-c", "SHA256SUMS", cwd=kit)
    assert done.returncode == 0, done.stderr
    listed = {line.split("  ")[1] for line in (kit / "SHA256SUMS").read_text().splitlines()}
    found = {path.relative_to(kit).as_posix() for path in kit.rglob("*") if path.is_file()}
    assert found - listed == {"SHA256SUMS", "SHA256SUMS.sig"}


def test_a_changed_file_is_seen_by_sha256sum(kit: Path) -> None:
    env = kit / ".env"
    env.write_text(env.read_text().replace("superlink.example.org", "mallory.example.org"))
    done = run("sha256sum", "-c", "SHA256SUMS", cwd=kit)
    assert done.returncode == 1
    assert ".env: FAILED" in done.stdout


def test_a_changed_list_fits_its_sums_but_not_its_signature(kit: Path) -> None:
    env, sums = kit / ".env", kit / "SHA256SUMS"
    before = hashlib.sha256(env.read_bytes()).hexdigest()
    env.write_text("FEDQLORA_CLIENT_IMAGE=mallory\n")
    after = hashlib.sha256(env.read_bytes()).hexdigest()
    assert is_signed(kit)
    sums.write_text(sums.read_text().replace(before, after))
    assert run("sha256sum", "-c", "SHA256SUMS", cwd=kit).returncode == 0, "the lie is well formed"
    assert not is_signed(kit)


def test_a_changed_archive_fits_neither_sum_nor_signature(archive: Path, tmp_path: Path) -> None:
    for suffix in ("", ".sha256", ".sig"):
        source = archive.with_name(archive.name + suffix)
        (tmp_path / source.name).write_bytes(source.read_bytes())
    with (tmp_path / archive.name).open("r+b") as file:
        file.seek(200)
        byte = file.read(1)[0]
        file.seek(200)
        file.write(bytes([byte ^ 1]))
    assert run("sha256sum", "-c", f"{archive.name}.sha256", cwd=tmp_path).returncode == 1
    key = unpack(archive, tmp_path / "good") / "trust" / "kit.pub"
    verify = ["openssl", "dgst", "-sha256", "-verify", key, "-signature", f"{archive.name}.sig"]
    assert run(*verify, archive.name, cwd=tmp_path).returncode == 1


def test_the_same_input_gives_the_same_bytes(archive: Path, certs: Path, tmp_path: Path) -> None:
    again = make_kit(certs, tmp_path)
    for suffix in ("", ".sha256", ".sig"):
        one, other = (path.with_name(path.name + suffix) for path in (archive, again))
        assert one.read_bytes() == other.read_bytes()
    other = make_kit(certs, tmp_path, release="0.1.0-2")
    assert other.read_bytes() != again.read_bytes()


def test_the_manifest_names_the_image_and_what_the_site_needs(kit: Path) -> None:
    manifest = json.loads((kit / "manifest.json").read_text())
    assert manifest["image"]["id"] == IMAGE.id
    assert manifest["image"]["reference"] == IMAGE.reference
    assert manifest["image"]["archive"] is None
    assert manifest["needs"] == {"engine": "20.10", "compose": "2.24", "driver": None}


def test_a_kit_for_gpus_names_the_least_driver(certs: Path, tmp_path: Path) -> None:
    cuda = replace(IMAGE, device="cuda")
    kit = unpack(build_kit(certs, "a", SUPERLINK, cuda, tmp_path), tmp_path)
    assert json.loads((kit / "manifest.json").read_text())["needs"]["driver"] == "580.65.06"
    assert read_settings(kit / ".env")["DEVICE"] == "cuda"
    assert read_settings(kit / "settings.env")["FEDQLORA_GPU"] == "0"


def test_the_coordinators_settings_are_filled_in_and_the_hospitals_are_the_templates(
    kit: Path,
) -> None:
    assert read_settings(kit / ".env") == {
        "FEDQLORA_SITE": "a",
        "FEDQLORA_SUPERLINK": SUPERLINK,
        "FEDQLORA_CLIENT_IMAGE": IMAGE.reference,
        "DEVICE": "cpu",
        "FEDQLORA_POLICY": "./policy",
        "FEDQLORA_KEYS_SUPERNODE": "./keys/supernode",
        "FEDQLORA_KEYS_TRAINER": "./keys/trainer",
    }
    template = read_settings(ROOT / "deploy" / "site" / ".env.example")
    own = read_settings(kit / "settings.env")
    assert own
    assert not own.keys() & read_settings(kit / ".env").keys()
    assert {**own, **read_settings(kit / ".env")}.keys() == template.keys() | {"DEVICE"}


def test_the_policy_explains_every_rule_and_allows_nothing_yet(kit: Path) -> None:
    policy = load_policy(kit / "policy.toml")
    text = (kit / "policy.toml").read_text()
    written = tomllib.loads(text)
    prose = " ".join(render_policy().replace("\n# ", " ").split())
    assert written.keys() == Policy.model_fields.keys()
    for name, field in Policy.model_fields.items():
        kind = field.annotation
        section = isinstance(kind, type) and issubclass(kind, Section)
        rules = kind.model_fields if section else {}  # type: ignore[union-attr]
        unset = {key for key, rule in rules.items() if rule.default is None}
        assert written[name].keys() == rules.keys() - unset
        assert all(f"\n# {key} =\n" in text for key in unset)
        for rule in rules.values() or [field]:
            assert rule.description
            assert " ".join(rule.description.split()) in prose, "a rule without its meaning"
    config = validate(RunConfig, {"model": {"base": "tiny"}}, "run.toml")
    with pytest.raises(PolicyRefusal, match=r"models\.digests"):
        check(policy, config, 1, "d" * 64, "")
    check(policy, config, 1, UNDECIDED, "")  # only the model is undecided


def test_the_list_of_parts_is_cyclonedx_and_names_each_package(kit: Path) -> None:
    listed = json.loads((kit / "sbom" / "client.cdx.json").read_text())
    assert (listed["bomFormat"], listed["specVersion"]) == ("CycloneDX", "1.6")
    assert listed["metadata"]["component"]["version"] == IMAGE.id
    assert {part["purl"] for part in listed["components"]} == {
        "pkg:pypi/torch@2.13.0%2Bcpu",
        "pkg:pypi/flwr@1.39.0",
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u10",
    }


def test_the_page_for_the_officer_says_whom_one_trusts_and_for_what(kit: Path) -> None:
    page = " ".join((kit / "data-flow.md").read_text().split())
    assert "The publisher of the image, for that image" in page
    assert "App code that the coordinator ships at run time" in page
    assert IMAGE.id in page
    assert SUPERLINK in page


def keys_in_all_formats() -> dict[str, bytes]:
    """One private key in each format that a kit must not carry."""
    p256, ed = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
    large = rsa.generate_private_key(65537, 2048)
    pem, der = serialization.Encoding.PEM, serialization.Encoding.DER
    pkcs8, old = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL
    ssh = serialization.PrivateFormat.OpenSSH
    none, locked = serialization.NoEncryption(), serialization.BestAvailableEncryption(b"long one")
    body = ed.private_bytes(pem, ssh, none).splitlines()[1:-1]
    secret = base64.urlsafe_b64encode(ed.private_bytes_raw()).decode()
    return {
        "pkcs8": p256.private_bytes(pem, pkcs8, none),
        "encrypted": p256.private_bytes(pem, pkcs8, locked),
        "sec1": p256.private_bytes(pem, old, none),
        "openssh": ed.private_bytes(pem, ssh, none),
        "openssh-raw": base64.b64decode(b"".join(body)),
        "openssh-bare": b"".join(body),
        "in-text": b"note\n" + p256.private_bytes(pem, pkcs8, none) + b"end\n",
        "der-pkcs8": p256.private_bytes(der, pkcs8, none),
        "der-pkcs8-ed": ed.private_bytes(der, pkcs8, none),
        "der-sec1": p256.private_bytes(der, old, none),
        "der-rsa": large.private_bytes(der, old, none),
        "der-rsa-pkcs8": large.private_bytes(der, pkcs8, none),
        "jwk": json.dumps({"kty": "OKP", "crv": "Ed25519", "d": secret}).encode(),
    }


@pytest.mark.parametrize("kind", keys_in_all_formats())
def test_a_planted_private_key_is_refused_and_leaves_no_archive(
    kind: str, certs: Path, tmp_path: Path
) -> None:
    planted = {"notes.txt": Member(keys_in_all_formats()[kind])}
    write_archive(tmp_path / "attack.tar.gz", "x", planted)
    assert (tmp_path / "attack.tar.gz").exists(), "without the check it is packed like any other"
    with pytest.raises(CertificateError, match=r"notes\.txt is or holds a private key"):
        build_kit(certs, "a", SUPERLINK, IMAGE, tmp_path / "out", extra=planted)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["client.key", "id_ed25519", "store.p12"])
def test_a_file_with_a_private_keys_name_is_refused_whatever_it_holds(name: str) -> None:
    with pytest.raises(CertificateError, match=f"{name} is or holds"):
        refuse_private_keys({name: Member(b"nothing")})


def test_a_private_key_in_a_layer_of_an_image_is_refused(certs: Path, tmp_path: Path) -> None:
    library = b'MARK = "-----BEGIN PRIVATE KEY-----"  # a name is not a key\n'
    planted = keys_in_all_formats()["pkcs8"]
    published = {"opt/lib/pem.py": library, "./usr/lib/libgnutls.so.30": b"\x7fELF" + planted}
    good = save_layers(tmp_path / "good.tar", published)
    bad = save_layers(tmp_path / "bad.tar", {"opt/lib/pem.py": library, "app/notes": planted})
    refuse_private_keys({"images/client.tar": Member(good)})
    with pytest.raises(CertificateError, match=r"images/client\.tar, file app/notes, is or holds"):
        build_kit(certs, "a", SUPERLINK, IMAGE, tmp_path / "out", image_archive=bad)
    kit = build_kit(certs, "a", SUPERLINK, IMAGE, tmp_path / "out", image_archive=good)
    folder = unpack(kit, tmp_path)
    assert (folder / "images" / "client.tar").read_bytes() == good.read_bytes()
    assert '"archive": "images/client.tar"' in (folder / "manifest.json").read_text()


def save_layers(path: Path, files: dict[str, bytes]) -> Path:
    """An archive as `docker save` writes one, with one layer."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with tarfile.open(path, "w") as tar:
        for name, content in {"1/layer.tar": layer.getvalue(), "manifest.json": b"[]"}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def test_the_kit_key_is_made_once_for_its_owner_alone_and_away_from_the_coordinators_folder(
    certs: Path, archive: Path, kit: Path
) -> None:
    key = certs / "kit" / "kit.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert archive.exists()
    assert fingerprint_key(open_kit_key(certs)) == fingerprint_key(open_kit_key(certs))
    assert (kit / "trust" / "kit.pub").read_bytes() == (certs / "kit" / "kit.pub").read_bytes()
    assert not list((certs / "coordinator").glob("kit*")), "that folder goes to the rounds' host"


@pytest.mark.parametrize(
    ("site", "superlink", "release", "sentence"),
    [
        ("", SUPERLINK, "1", "cannot name a site"),
        ("../b", SUPERLINK, "1", "cannot name a site"),
        ("coordinator", SUPERLINK, "1", "name of a part of the centre"),
        ("a", SUPERLINK, "../1", "cannot name a release"),
        ("a", "superlink.example.org", "1", "is not an address"),
        ("a", "elsewhere.example.org:9092", "1", "not valid for elsewhere.example.org"),
    ],
)
def test_what_cannot_be_a_kit_is_refused_in_one_sentence(
    site: str, superlink: str, release: str, sentence: str, certs: Path, tmp_path: Path
) -> None:
    with pytest.raises(MisuseError, match=sentence):
        build_kit(certs, site, superlink, IMAGE, tmp_path / "out", release=release)
    assert not (tmp_path / "out").exists()


def test_a_revoked_site_gets_no_kit(tmp_path: Path) -> None:
    certs = make_federation(tmp_path)
    make_kit(certs, tmp_path / "before", site="b")
    revoke(certs, "b")
    with pytest.raises(CertificateError, match="Site b is revoked"):
        make_kit(certs, tmp_path / "kits", site="b")
    assert not (tmp_path / "kits").exists()


def test_without_keys_of_a_centre_the_command_says_so_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--site", "a", "--certs", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "server.crt cannot be read" in said.err


def test_make_says_that_a_site_is_missing() -> None:
    done = run("make", "site-kit", cwd=ROOT)
    assert done.returncode == 2
    assert "SITE is missing: make site-kit SITE=a" in done.stdout + done.stderr


def test_the_address_that_sites_are_told_is_the_certificates_first_from_outside(
    certs: Path, tmp_path: Path
) -> None:
    assert choose_superlink(certs) == SUPERLINK
    make_all(tmp_path / "out", ["a"])
    assert choose_superlink(tmp_path / "out") == "localhost:9092"


def test_a_missing_engine_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CertificateError, match="There is no docker command"):
        read_image("fedqlora-client:cpu")
