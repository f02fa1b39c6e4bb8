"""What a SuperNode hands to its SuperExec: whom to trust, and the secret they share.

The SuperExec runs the code that the coordinator ships, in a place of its own, so it gets none of
the site's keys. A certificate that only these two know and a random secret are made for them
and lie in one folder, which both mount and nobody else; there is nothing for a person to handle.
"""

from __future__ import annotations

import datetime
import ipaddress
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedqlora.errors import ConfigError
from fedqlora.files import write_durably

SECRET_BYTES = 32
_LIFETIME = datetime.timedelta(days=3650)  # a restart makes another; it never has to be renewed
_CLOCK_SLACK = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Handover:
    """Files of one SuperNode's life; all of them readable by this user only."""

    certificate: Path
    """Certificate of the SuperNode's Runtime API, PEM; what the SuperExec trusts."""
    key: Path
    """Its private key, which stays with the SuperNode."""
    secret: Path
    """Secret that signs what the SuperExec asks for."""


def make_handover(folder: Path, private: Path, host: str) -> Handover:
    """Makes a new certificate and a new secret.

    Args:
        folder: what the SuperExec sees; gets `ca.crt` and `secret`.
        private: what it does not see; gets `runtime.key`.
        host: DNS name or address under which the SuperExec reaches the Runtime API.

    Raises:
        ConfigError: a folder cannot be written.
    """
    files = Handover(folder / "ca.crt", private / "runtime.key", folder / "secret")
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    certificate = _certify(key, host).public_bytes(serialization.Encoding.PEM)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path, content in (
            (files.key, pem),
            (files.secret, secrets.token_bytes(SECRET_BYTES)),
            (files.certificate, certificate),
        ):
            write_durably(path, content, 0o600)
    except OSError as error:
        raise ConfigError(
            f"The hand-over folder {folder} cannot be written ({error.strerror}): give it to "
            "this user."
        ) from None
    return files


def _certify(key: ec.EllipticCurvePrivateKey, host: str) -> x509.Certificate:
    """A self-signed server certificate for one host."""
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedqlora supernode")])
    try:
        alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        alternative = x509.DNSName(host)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SLACK)
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
