"""Hostile requests: each is first shown accepted in its well-formed form, then refused as it came.

`forge` writes a request as the site's own command does, with one thing changed and everything
that has to be signed signed again: what is refused is refused for that one thing.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from certs.acceptance import accept_reply
from certs.bundle import encode_bundle, encode_json, encode_signature
from certs.certificate import make_name
from certs.files import CertificateError, encode_key, encode_public, read_certificates
from certs.request import CONTEXT, Request, name_roots
from certs.revocation import revoke
from certs.signing import Signed, sign_request
from tests.certs.sites import confirm, enrol, renew

URI = "urn:fedqlora:site:h"


def refuse(request: Request) -> None:
    pytest.fail(f"the request of {request.site} passed every check")


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class Forge:
    """What a request is made of; a test changes one thing."""

    out: Path
    client: Any = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    supernode: Any = field(default_factory=lambda: ec.generate_private_key(ec.SECP384R1()))
    signing: Any = field(default_factory=ed25519.Ed25519PrivateKey.generate)
    subject: str = "h"
    names: list[str] = field(default_factory=lambda: [URI])
    authority: bool | None = None
    attribute: bool = False
    manifest: dict[str, Any] = field(default_factory=dict)
    members: dict[str, bytes] = field(default_factory=dict)
    node_signer: Any = None
    signer: Any = None

    def csr(self) -> bytes:
        names = x509.SubjectAlternativeName(
            [x509.UniformResourceIdentifier(one) for one in self.names]
        )
        builder = x509.CertificateSigningRequestBuilder().subject_name(make_name(self.subject))
        builder = builder.add_extension(names, critical=False)
        if self.authority is not None:
            constraints = x509.BasicConstraints(ca=self.authority, path_length=None)
            builder = builder.add_extension(constraints, critical=True)
        if self.attribute:
            builder = builder.add_attribute(x509.ObjectIdentifier("1.2.840.113549.1.9.7"), b"x")
        return builder.sign(self.client, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def files(self) -> dict[str, bytes]:
        """All members, in order, signed."""
        openssh = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        files = {
            "client.csr": self.csr(),
            "supernode.pub": self.supernode.public_key().public_bytes(*openssh) + b"\n",
            "signing.pub": encode_public(self.signing.public_key())
            if isinstance(self.signing, ed25519.Ed25519PrivateKey)
            else self.signing.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            ),
        } | {name: one for name, one in self.members.items() if name != "signature"}
        folder = self.out / "superlink" / "current"
        coordinator = serialization.load_pem_public_key((folder / "coordinator.pub").read_bytes())
        assert isinstance(coordinator, ed25519.Ed25519PublicKey)
        digest = hashes.Hash(hashes.SHA256())
        digests = {}
        for name, content in files.items():
            digest = hashes.Hash(hashes.SHA256())
            digest.update(content)
            digests[name] = digest.finalize().hex()
        fields = {
            "format": 1,
            "kind": "request",
            "site": "h",
            "roots": name_roots(read_certificates(folder / "root.crt")),
            "coordinator": coordinator.public_bytes_raw().hex(),
            "renews": "",
            "files": digests,
        } | self.manifest
        manifest = encode_json(fields)
        signer, node = self.signer or self.signing, self.node_signer or self.supernode
        signature = (
            signer.sign(CONTEXT + manifest)
            if isinstance(signer, ed25519.Ed25519PrivateKey)
            else b"none"
        )
        signed = {
            "supernode.sig": encode_signature(
                node.sign(CONTEXT + manifest, ec.ECDSA(hashes.SHA384()))
                if isinstance(node, ec.EllipticCurvePrivateKey)
                else b"none"
            ),
            "signature": self.members.get("signature", encode_signature(signature)),
        }
        return {"manifest.json": manifest, **files, **signed}


def admit(out: Path, folder: Path, content: bytes) -> Signed:
    """Send the coordinator these bytes as a request of site h."""
    path = folder / "h.request.tar"
    path.write_bytes(content)
    return sign_request(out, path, confirm)


def check_refused(out: Path, folder: Path, content: bytes, reason: str) -> None:
    """Refused in one sentence, before anybody is asked, with nothing written anywhere."""
    path = folder / "h.request.tar"
    path.write_bytes(content)
    before, lying = snapshot(out), sorted(folder.rglob("*"))
    with pytest.raises(CertificateError, match=reason) as caught:
        sign_request(out, path, refuse)
    assert "\n" not in str(caught.value)
    assert snapshot(out) == before
    assert sorted(folder.rglob("*")) == lying


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


FORGERIES: dict[str, tuple[Mapping[str, Any], str]] = {
    "another site's name in the CSR": ({"names": ["urn:fedqlora:site:a"]}, "other names"),
    "one name more": ({"names": [URI, "urn:fedqlora:site:a"]}, "other names"),
    "another subject": ({"subject": "superlink"}, "other names"),
    "an authority": ({"authority": True}, "CA:TRUE"),
    "an extension too many": ({"authority": False}, "other names or uses"),
    "an attribute": ({"attribute": True}, "attributes"),
    "a reserved name": (
        {
            "names": ["urn:fedqlora:site:evaluator"],
            "subject": "evaluator",
            "manifest": {"site": "evaluator"},
        },
        "no possible site",
    ),
    "a path as a name": ({"manifest": {"site": "../../authority"}}, "no possible site"),
    "a TLS key on P-384": (
        {"client": ec.generate_private_key(ec.SECP384R1())},
        "not for a key on the curve P-256",
    ),
    "a TLS key of RSA": (
        {"client": rsa.generate_private_key(65537, 2048)},
        "not for a key on the curve P-256",
    ),
    "a SuperNode key on P-256": (
        {"supernode": ec.generate_private_key(ec.SECP256R1())},
        "not one on the curve P-384",
    ),
    "a SuperNode key of Ed25519": (
        {"supernode": ed25519.Ed25519PrivateKey.generate()},
        "not one on the curve P-384",
    ),
    "a signing key of ECDSA": (
        {"signing": ec.generate_private_key(ec.SECP256R1())},
        "not an Ed25519 key",
    ),
    "signed with another key": (
        {"signer": ed25519.Ed25519PrivateKey.generate()},
        "not signed with the keys",
    ),
    "a SuperNode key that the sender has not got": (
        {"node_signer": ec.generate_private_key(ec.SECP384R1())},
        "not signed with the keys",
    ),
    "a signature of something else": ({"members": {"signature": b"00\n"}}, "not signed"),
    "another coordinator": ({"manifest": {"coordinator": "0" * 64}}, "another coordinator"),
    "another root": ({"manifest": {"roots": ["0" * 64]}}, "another coordinator or root"),
    "no root": ({"manifest": {"roots": []}}, "names no root"),
    "roots that are none": ({"manifest": {"roots": [1]}}, "not a site's request"),
    "another format": ({"manifest": {"format": 2}}, "format 1"),
    "a field too many": ({"manifest": {"more": "x"}}, "truncated or damaged"),
    "a field of another type": ({"manifest": {"site": 3}}, "truncated or damaged"),
    "another kind": ({"manifest": {"kind": "reply"}}, "not a site's request"),
    "digests of other files": ({"manifest": {"files": {}}}, "other files than its manifest"),
    "a garbled CSR": ({"members": {"client.csr": b"garbage"}}, "cannot be read"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_request_with_one_thing_changed_is_refused(damaged: Path, inbox: Path, name: str) -> None:
    changes, reason = FORGERIES[name]
    check_refused(damaged, inbox, encode_bundle(Forge(damaged, **changes).files()), reason)
    # Without the change it is admitted.
    assert admit(damaged, inbox, encode_bundle(Forge(damaged).files())).anew


def test_a_csr_that_its_own_key_did_not_sign_is_refused(damaged: Path, inbox: Path) -> None:
    body = Forge(damaged).csr().splitlines()
    body[-2] = body[-2][:8] + bytes([body[-2][8] ^ 1]) + body[-2][9:]
    csr = b"\n".join(body) + b"\n"
    content = encode_bundle(Forge(damaged, members={"client.csr": csr}).files())
    check_refused(damaged, inbox, content, "signed with its own key|cannot be read")


def _member(name: str, content: bytes = b"x", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    return member, content


def _pack(
    files: Mapping[str, bytes],
    *more: tuple[tarfile.TarInfo, bytes],
    format_: int = tarfile.USTAR_FORMAT,
) -> bytes:
    """A tar of these files and what was slipped in behind them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as archive:
        for name, content in files.items():
            archive.addfile(_member(name, content)[0], io.BytesIO(content))
        for member, content in more:
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _key_inside(files: dict[str, bytes]) -> bytes:
    key = encode_key(ec.generate_private_key(ec.SECP256R1()))
    return _pack({**files, "supernode.sig": key})


def _other_format(files: dict[str, bytes]) -> bytes:
    content = _pack(files, format_=tarfile.GNU_FORMAT)
    assert len(content) == len(_pack(files))
    return content


TARS: dict[str, tuple[Callable[[dict[str, bytes]], bytes], str]] = {
    "a private key in a member": (_key_inside, "holds a private key"),
    "a private key as a member": (
        lambda files: _pack(files, _member("client.key", b"-----BEGIN EC PRIVATE KEY-----")),
        "holds a private key",
    ),
    "a path upwards": (
        lambda files: _pack(files, _member("../authority/sites.crt")),
        "does not belong there",
    ),
    "an absolute path": (
        lambda files: _pack(files, _member("/etc/passwd")),
        "does not belong there",
    ),
    "a symbolic link": (
        lambda files: _pack(
            files, _member("signature", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        ),
        "not an ordinary file",
    ),
    "a hard link": (
        lambda files: _pack(
            files, _member("signature", b"", type=tarfile.LNKTYPE, linkname="signing.pub")
        ),
        "not an ordinary file",
    ),
    "a device": (
        lambda files: _pack(files, _member("signature", b"", type=tarfile.CHRTYPE)),
        "not an ordinary file",
    ),
    "a folder": (
        lambda files: _pack(files, _member("signature", b"", type=tarfile.DIRTYPE)),
        "not an ordinary file",
    ),
    "a long name in a header of its own": (
        lambda files: _pack(files, _member("x" * 200), format_=tarfile.GNU_FORMAT),
        "not an ordinary file",
    ),
    "an extra member": (lambda files: _pack(files, _member("more")), "does not belong there"),
    "a member twice": (
        lambda files: _pack(files, _member("signature", files["signature"])),
        "twice",
    ),
    "a member missing": (
        lambda files: _pack({name: one for name, one in files.items() if name != "signature"}),
        "lacks signature",
    ),
    "members in another order": (
        lambda files: _pack(dict(reversed(files.items()))),
        "truncated or damaged",
    ),
    "another format of tar": (_other_format, "truncated or damaged"),
    "an executable member": (
        lambda files: _pack(
            {name: one for name, one in files.items() if name != "signature"},
            _member("signature", files["signature"], mode=0o755),
        ),
        "truncated or damaged",
    ),
    "bytes behind the end": (lambda files: encode_bundle(files) + b"x", "truncated or damaged"),
    "cut in a member": (lambda files: encode_bundle(files)[:700], "truncated or damaged"),
    "cut in a header": (lambda files: encode_bundle(files)[:300], "truncated or damaged"),
    "cut before the end": (lambda files: encode_bundle(files)[:-512], "truncated or damaged"),
    "no tar": (lambda _: b"garbage", "truncated or damaged"),
    "nothing": (lambda _: b"", "lacks manifest.json"),
    "a member larger than the file": (
        lambda files: encode_bundle(files).replace(
            b"%011o" % len(files["manifest.json"]), b"7" * 11
        ),
        "truncated or damaged",
    ),
    "too large": (
        lambda files: _pack({**files, "supernode.sig": b"0" * 70000}),
        "larger than any bundle",
    ),
}


@pytest.mark.parametrize("name", TARS)
def test_a_tar_that_is_not_exactly_a_request_is_refused(
    damaged: Path, inbox: Path, name: str
) -> None:
    spoil, reason = TARS[name]
    files = Forge(damaged).files()
    check_refused(damaged, inbox, spoil(files), reason)
    assert admit(damaged, inbox, encode_bundle(files)).anew


def test_what_is_no_file_is_refused(damaged: Path, inbox: Path) -> None:
    for path, reason in ((inbox, "is not a file"), (inbox / "none", "cannot be read")):
        with pytest.raises(CertificateError, match=reason):
            sign_request(damaged, path, refuse)


@pytest.mark.parametrize("kind", ["client", "supernode", "signing"])
@pytest.mark.parametrize("revoked", [False, True], ids=["admitted", "revoked"])
def test_a_key_that_another_site_has_or_had_is_refused(
    damaged: Path, inbox: Path, kind: str, revoked: bool
) -> None:
    first = Forge(damaged)
    assert admit(damaged, inbox, encode_bundle(first.files())).anew
    if revoked:
        revoke(damaged, "h")
    second = {
        "subject": "i",
        "names": ["urn:fedqlora:site:i"],
        "manifest": {"site": "i"},
    }
    reused = Forge(damaged, **second, **{kind: getattr(first, kind)})
    check_refused(damaged, inbox, encode_bundle(reused.files()), "reuses a key of h")
    assert admit(damaged, inbox, encode_bundle(Forge(damaged, **second).files())).site == "i"


def test_a_name_that_is_taken_or_was_revoked_is_refused(damaged: Path, inbox: Path) -> None:
    taken = {"subject": "b", "names": ["urn:fedqlora:site:b"], "manifest": {"site": "b"}}
    content = encode_bundle(Forge(damaged, **taken).files())
    check_refused(damaged, inbox, content, "admitted already")
    revoke(damaged, "b")
    check_refused(damaged, inbox, content, "was revoked")
    shutil.rmtree(damaged / "sites" / "b")
    assert admit(damaged, inbox, content).site == "b"


def test_a_renewal_is_taken_from_the_site_itself_only(
    damaged: Path, inbox: Path, tmp_path: Path
) -> None:
    home = tmp_path / "h"
    enrol(damaged, home)
    leaf = read_certificates(damaged / "sites/h/current/client.crt")[0]
    renews = {"renews": leaf.fingerprint(hashes.SHA256()).hex()}
    stranger = Forge(damaged, manifest=renews)
    check_refused(damaged, inbox, encode_bundle(stranger.files()), "not signed with the keys of")
    # Of a site whose keys the centre made, no renewal is known.
    other = Forge(
        damaged,
        subject="a",
        names=["urn:fedqlora:site:a"],
        manifest={"site": "a", **renews},
    )
    check_refused(damaged, inbox, encode_bundle(other.files()), "not admitted with keys of its own")
    assert renew(damaged, home).anew


def test_an_old_renewal_does_not_come_back(damaged: Path, inbox: Path, tmp_path: Path) -> None:
    home = tmp_path / "h"
    enrol(damaged, home)
    signed = renew(damaged, home)
    old = (home / "h.request.tar").read_bytes()
    accept_reply(home, signed.reply)
    # The same once more is no change; after the next renewal it would be an old key's return.
    assert not admit(damaged, inbox, old).anew
    accept_reply(home, renew(damaged, home).reply)
    check_refused(damaged, inbox, old, "another certificate than the present one")
