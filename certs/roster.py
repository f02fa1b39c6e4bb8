"""The roster: which public keys belong to which party, signed by the coordinator.

`roster.json` binds a site's three keys to its name; `roster.sig` is the coordinator's Ed25519
signature, in hex, over `fedqlora roster v1`, a newline and the exact bytes of `roster.json`.
The first line keeps a signature over anything else from passing as one over a roster.

A site reconnects some time after its TLS key was rotated: until the next rotation the roster
lists both keys, the present one and the one before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from certs.files import CertificateError, read_file, replace_file

CONTEXT = b"fedqlora roster v1\n"
ROSTER_FILE = "roster.json"
SIGNATURE_FILE = "roster.sig"
ACCEPTED_KEYS = 2


@dataclass(frozen=True, kw_only=True)
class SiteKeys:
    """A site's public keys."""

    signing: str
    """Ed25519 public key, 32 bytes in hex: verifies the site's replies."""
    supernode: str
    """Elliptic-curve public key, one line in OpenSSH format: registered with the SuperLink."""
    tls: tuple[str, ...]
    """SHA-256 in hex of each accepted TLS key's SubjectPublicKeyInfo: the present key, then the
    one before the last rotation if there is one."""

    def rotate(self, tls: str) -> SiteKeys:
        """Return the keys after a change of TLS key: what was present is accepted once more."""
        return replace(self, tls=(tls, *(key for key in self.tls if key != tls))[:ACCEPTED_KEYS])


@dataclass(frozen=True, kw_only=True)
class Roster:
    """All parties of a federation and their public keys."""

    coordinator: str
    """Ed25519 public key in hex: signs instructions and this roster."""
    evaluator: str
    """Ed25519 public key in hex: signs the central evaluation's replies."""
    sites: Mapping[str, SiteKeys]
    """By site name."""

    def follow(self, signed: Roster | None) -> Roster:
        """Return this roster with the keys that the one before it still accepts.

        Args:
            signed: the roster before it, or None if this is the first one.
        """
        if signed is None:
            return self
        sites = {
            name: signed.sites[name].rotate(keys.tls[0]) if name in signed.sites else keys
            for name, keys in self.sites.items()
        }
        return replace(self, sites=sites)

    def encode(self) -> bytes:
        """Return the bytes of `roster.json`: equal rosters have equal bytes."""
        content = {
            "coordinator": self.coordinator,
            "evaluator": {"signing": self.evaluator},
            "sites": {name: asdict(keys) for name, keys in self.sites.items()},
        }
        return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"


def sign_roster(roster: Roster, key: ed25519.Ed25519PrivateKey) -> dict[str, bytes]:
    """Return the roster's file and its signature's, by name; Ed25519 signs the same way again."""
    content = roster.encode()
    signature = key.sign(CONTEXT + content).hex().encode() + b"\n"
    return {ROSTER_FILE: content, SIGNATURE_FILE: signature}


def write_roster(folder: Path, roster: Roster, key: ed25519.Ed25519PrivateKey) -> None:
    """Sign a roster and write it, replacing the folder's previous one.

    Raises:
        CertificateError: the folder cannot be written.
    """
    for name, content in sign_roster(roster, key).items():
        replace_file(folder / name, content)


def read_roster(folder: Path, coordinator: ed25519.Ed25519PublicKey) -> Roster:
    """Return the folder's roster after checking its signature.

    Guarantees: what is returned was signed, byte for byte, with the coordinator's key; a roster
    that names another coordinator is refused even if the signature is good.

    Raises:
        CertificateError: a file is missing, the signature is wrong or the content is not a roster.
    """
    path = folder / ROSTER_FILE
    return decode_roster(
        read_file(path), read_file(folder / SIGNATURE_FILE), coordinator, str(path)
    )


def decode_roster(
    content: bytes, signature: bytes, coordinator: ed25519.Ed25519PublicKey, where: str
) -> Roster:
    """Return a roster after checking its signature; `read_roster` says what that guarantees.

    Args:
        content: the bytes of `roster.json`.
        signature: the bytes of `roster.sig`.
        coordinator: who has to have signed it.
        where: what to call it in an error.

    Raises:
        CertificateError: the signature is wrong or the content is not a roster.
    """
    try:
        coordinator.verify(bytes.fromhex(signature.decode("ascii")), CONTEXT + content)
    except (ValueError, InvalidSignature) as error:
        raise CertificateError(
            f"{where} is not signed by the coordinator's key; restore it and its signature."
        ) from error
    try:
        fields = json.loads(content)
        roster = Roster(
            coordinator=fields["coordinator"],
            evaluator=fields["evaluator"]["signing"],
            sites={name: _read_site(keys) for name, keys in fields["sites"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CertificateError(f"{where} is not a roster; restore it.") from error
    if roster.coordinator != encode_signing(coordinator):
        raise CertificateError(f"{where} names another coordinator than its signer; restore it.")
    return roster


def _read_site(fields: Mapping[str, object]) -> SiteKeys:
    """Read one site's entry; rosters written before keys rotated hold a single TLS key."""
    tls = fields["tls"]
    keys = [tls] if isinstance(tls, str) else tls
    if not isinstance(keys, list) or not 1 <= len(keys) <= ACCEPTED_KEYS:
        raise ValueError("not a list of TLS keys")
    texts = [fields["signing"], fields["supernode"], *keys]
    if len(fields) != 3 or not all(isinstance(one, str) for one in texts):
        raise ValueError("not three kinds of keys")
    signing, supernode, *accepted = (str(one) for one in texts)
    return SiteKeys(signing=signing, supernode=supernode, tls=tuple(accepted))


def compare_rosters(signed: Roster, found: Roster) -> list[str]:
    """Return one clause for each party of a signed roster whose keys were not found.

    Args:
        signed: what the coordinator signed.
        found: what the key files say; they hold the present TLS keys only.
    """
    differences = []
    if signed.evaluator != found.evaluator:
        differences.append("the roster holds another signing key for the evaluator than its folder")
    for name, keys in sorted(signed.sites.items()):
        if name not in found.sites:
            differences.append(f"the roster names site {name}, whose folder is missing")
            continue
        present = replace(keys, tls=keys.tls[:1])
        for kind, key in asdict(present).items():
            if key != asdict(found.sites[name])[kind]:
                differences.append(
                    f"the roster holds another {kind} key for site {name} than its folder"
                )
    return differences


def encode_signing(key: ed25519.Ed25519PublicKey) -> str:
    """Return a signing key as the roster carries it: 32 bytes in hex."""
    return key.public_bytes_raw().hex()


def encode_supernode(key: ec.EllipticCurvePublicKey) -> str:
    """Return a SuperNode key as the roster carries it: one line in OpenSSH format."""
    return key.public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ).decode("ascii")


def encode_tls(key: ec.EllipticCurvePublicKey) -> str:
    """Return a TLS key as the roster carries it: SHA-256 of its public key info, in hex."""
    info = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(info).hexdigest()
