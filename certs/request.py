"""A site's request: its three public keys, proved to be its own, and whom it trusts.

A request is a bundle of `manifest.json` (format, site, the roots and the coordinator's key that
the site trusts, the certificate that it renews, SHA-256 of the other files), `client.csr`,
`supernode.pub`, `signing.pub`, and the manifest signed with the SuperNode key (`supernode.sig`)
and with the signing key (`signature`). The CSR is signed with the TLS key: all three are proved.

Guarantees, each restated by a test in tests/certs/test_enrolment.py:

- Nothing but what is named here is in a request that was read, no private key in particular.
- The fingerprint binds the site's name, its three keys, the coordinator's key and the roots: if
  both sides read the same one, neither was given another's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from certs.bundle import (
    MANIFEST,
    SIGNATURE,
    decode_bundle,
    decode_signature,
    encode_bundle,
    encode_json,
    encode_signature,
    read_bounded,
    seal,
    unseal,
)
from certs.certificate import make_name
from certs.files import CertificateError, MisuseError, encode_public
from certs.fingerprint import name_bytes
from certs.names import SITE_URI, check_sites
from certs.roster import SiteKeys, encode_signing, encode_supernode, encode_tls

CONTEXT = b"fedqlora enrolment request v1\n"
LIMIT_BYTES = 65536
CSR_FILE = "client.csr"
SUPERNODE_FILE = "supernode.pub"
SIGNING_FILE = "signing.pub"
_NODE_SIGNATURE = "supernode.sig"
_FILES = (CSR_FILE, SUPERNODE_FILE, SIGNING_FILE)
_FIELDS = {"kind": str, "site": str, "roots": list, "coordinator": str, "renews": str}
_FINGERPRINT = b"fedqlora enrolment v1\n"


@dataclass(frozen=True, kw_only=True)
class PrivateKeys:
    """A site's private keys; they stay where they were made."""

    client: ec.EllipticCurvePrivateKey
    """TLS, P-256."""
    supernode: ec.EllipticCurvePrivateKey
    """Signs the SuperNode's calls, P-384."""
    signing: ed25519.Ed25519PrivateKey
    """Signs replies."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request that was read and found to be whole; whose it is, its fingerprint says."""

    site: str
    """The site's name."""
    keys: SiteKeys
    """Its public keys, as a roster carries them."""
    client: ec.EllipticCurvePublicKey
    """Its TLS key."""
    roots: tuple[str, ...]
    """SHA-256 in hex of each root certificate that the site trusts, sorted."""
    coordinator: str
    """The coordinator's key that the site trusts, in hex."""
    renews: str
    """SHA-256 in hex of the certificate that it renews; empty for a new site."""
    content: bytes
    """The bundle."""

    @property
    def digest(self) -> str:
        """SHA-256 of the bundle in hex: names it in the reply."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def fingerprint(self) -> str:
        """What both sides compare."""
        bound = {
            "site": self.site,
            "signing": self.keys.signing,
            "supernode": self.keys.supernode,
            "tls": self.keys.tls[0],
            "coordinator": self.coordinator,
            "roots": self.roots,
        }
        return name_bytes(_FINGERPRINT + encode_json(bound))


def encode_request(
    site: str,
    keys: PrivateKeys,
    roots: list[x509.Certificate],
    coordinator: ed25519.Ed25519PublicKey,
    renews: x509.Certificate | None = None,
) -> bytes:
    """Return a signed request for a site's keys.

    Args:
        site: its name.
        keys: its private keys, of which only public halves and signatures enter the request.
        roots: what it trusts in the SuperLink.
        coordinator: whose instructions it trusts.
        renews: the certificate that is to be replaced; None for a new site.
    """
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(make_name(site))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"{SITE_URI}{site}")]),
            critical=False,
        )
        .sign(keys.client, hashes.SHA256())
    )
    files = {
        CSR_FILE: csr.public_bytes(serialization.Encoding.PEM),
        SUPERNODE_FILE: encode_supernode(keys.supernode.public_key()).encode("ascii") + b"\n",
        SIGNING_FILE: encode_public(keys.signing.public_key()),
    }
    fields = {
        "kind": "request",
        "site": site,
        "roots": name_roots(roots),
        "coordinator": encode_signing(coordinator),
        "renews": "" if renews is None else digest_certificate(renews),
    }
    manifest = seal(fields, files)
    signed = CONTEXT + manifest
    node_signature = keys.supernode.sign(signed, ec.ECDSA(hashes.SHA384()))
    return encode_bundle(
        {
            MANIFEST: manifest,
            **files,
            _NODE_SIGNATURE: encode_signature(node_signature),
            SIGNATURE: encode_signature(keys.signing.sign(signed)),
        }
    )


def read_request(path: Path) -> Request:
    """Read a request, which may come from anybody.

    Raises:
        CertificateError: it is not one, or not whole; nothing was written.
    """
    return decode_request(read_bounded(path, LIMIT_BYTES), str(path))


def decode_request(content: bytes, where: str) -> Request:
    """Return what a request holds after checking all that it says about itself.

    Args:
        content: the bundle.
        where: what to call it in an error.

    Raises:
        CertificateError: it is not a request, or not whole.
    """
    files = decode_bundle(content, (MANIFEST, *_FILES, _NODE_SIGNATURE, SIGNATURE), where)
    fields = unseal(files[MANIFEST], _FIELDS, {name: files[name] for name in _FILES}, where)
    site, roots = str(fields["site"]), cast("list[object]", fields["roots"])
    known = fields["kind"] == "request" and isinstance(roots, list)
    if not known or not all(map(_is_digest, roots)):
        raise CertificateError(f"{where} is not a site's request; name the right file.")
    try:
        check_sites([site])
    except MisuseError as error:
        raise CertificateError(f"{where} comes from no possible site: {error}") from error
    signing = _read_signing(files[SIGNING_FILE], where)
    supernode = _read_supernode(files[SUPERNODE_FILE], where)
    signed = CONTEXT + files[MANIFEST]
    try:
        signing.verify(decode_signature(files[SIGNATURE]), signed)
        node_signature = decode_signature(files[_NODE_SIGNATURE])
        supernode.verify(node_signature, signed, ec.ECDSA(hashes.SHA384()))
    except (ValueError, InvalidSignature) as error:
        raise CertificateError(
            f"{where} is not signed with the keys in it; ask the site for a new one."
        ) from error
    client = _read_csr(files[CSR_FILE], site, where)
    return Request(
        site=site,
        keys=SiteKeys(
            signing=encode_signing(signing),
            supernode=encode_supernode(supernode),
            tls=(encode_tls(client),),
        ),
        client=client,
        roots=tuple(map(str, roots)),
        coordinator=str(fields["coordinator"]),
        renews=str(fields["renews"]),
        content=content,
    )


def digest_certificate(certificate: x509.Certificate) -> str:
    """Return the SHA-256 of a certificate in hex, as `openssl x509 -fingerprint -sha256` has it."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def name_roots(roots: list[x509.Certificate]) -> list[str]:
    """Return the digests of roots as a request carries them: sorted, each once."""
    return sorted({digest_certificate(one) for one in roots})


def _read_csr(content: bytes, site: str, where: str) -> ec.EllipticCurvePublicKey:
    """Return the key of a CSR that names this site and asks for nothing else."""
    wrong = f"The CSR in {where}"
    try:
        csr = x509.load_pem_x509_csr(content)
        key, extensions = csr.public_key(), list(csr.extensions)
        whole = csr.is_signature_valid and csr.public_bytes(serialization.Encoding.PEM) == content
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension) as error:
        raise CertificateError(f"{wrong} cannot be read; ask the site for a new one.") from error
    if not whole:
        raise CertificateError(f"{wrong} is not signed with its own key; ask for a new one.")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CertificateError(f"{wrong} is not for a key on the curve P-256; ask for a new one.")
    for extension in extensions:
        if isinstance(extension.value, x509.BasicConstraints) and extension.value.ca:
            raise CertificateError(f"{wrong} asks for an authority (CA:TRUE); refuse the sender.")
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"{SITE_URI}{site}")])
    if csr.subject != make_name(site) or [one.value for one in extensions] != [names]:
        raise CertificateError(
            f"{wrong} asks for other names or uses than those of site {site}; ask for a new one."
        )
    # Whatever else there is could only smuggle something past a reader.
    if len(csr.attributes) != 1:
        raise CertificateError(f"{wrong} has attributes that do not belong there; refuse it.")
    return key


def _read_supernode(content: bytes, where: str) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise CertificateError(
            f"The SuperNode key in {where} is not one on the curve P-384; ask for a new request."
        )
    if encode_supernode(key).encode("ascii") + b"\n" != content:
        raise CertificateError(
            f"The SuperNode key in {where} is not written as it should be; ask for a new request."
        )
    return key


def _read_signing(content: bytes, where: str) -> ed25519.Ed25519PublicKey:
    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ed25519.Ed25519PublicKey) or encode_public(key) != content:
        raise CertificateError(
            f"The signing key in {where} is not an Ed25519 key; ask for a new request."
        )
    return key


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
