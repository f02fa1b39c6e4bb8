"""TLS identities: what is read from a key folder, what is checked, and one trial handshake.

A key folder holds `<role>.key`, `<role>.crt` (leaf first, then intermediates) and `ca.crt` (what
the other side's certificate must come from); a server's also `root.crt` (what its own comes from,
which for a client is `ca.crt`). They lie there directly or behind a `current` link that a renewal
swaps. Both launchers use this, so that a bad file or a refused handshake ends as one sentence
before Flower starts.
"""

from __future__ import annotations

import datetime
import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedqlora.errors import ConfigError, FederationError

Role = Literal["server", "client"]

# OpenSSL's X509_V_ERR_* numbers, as `ssl.SSLCertVerificationError.verify_code` gives them.
_NOT_YET_VALID, _EXPIRED, _WRONG_HOST, _WRONG_ADDRESS = 9, 10, 62, 64


def prepare_grpc() -> None:
    """Leaves TLS 1.3 as the only version gRPC can agree on; call before `grpc` is imported.

    gRPC for Python has no switch for it, but a variable with the ciphers of TLS 1.2, read when
    it is imported (those of 1.3 are fixed): it is set to one that needs a pre-shared key, which
    nobody has. Handshakes that others fail are not logged line by line.
    """
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-CHACHA20-POLY1305"
    os.environ.setdefault("GRPC_VERBOSITY", "error")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """One party's TLS key, certificate and trusted authority, checked against each other."""

    folder: Path
    """Folder that the files were read from, with `current` resolved."""
    key_pem: bytes
    """Private key (PEM)."""
    chain_pem: bytes
    """Certificate chain (PEM), leaf first."""
    authority_pem: bytes
    """What the other side's certificate must come from (PEM)."""
    key_path: Path
    """File of `key_pem`."""
    chain_path: Path
    """File of `chain_pem`."""
    authority_path: Path
    """File of `authority_pem`."""
    leaf: x509.Certificate
    """First certificate of the chain."""

    @property
    def serial(self) -> str:
        """The leaf's serial number; see `format_serial`."""
        return format_serial(self.leaf)


def format_serial(leaf: x509.Certificate) -> str:
    """Returns a serial number in hex, as `openssl x509 -serial` prints it: whole bytes."""
    text = f"{leaf.serial_number:X}"
    return text.zfill(len(text) + len(text) % 2)


def resolve_current(folder: Path) -> Path:
    """Returns the folder behind `folder/current` where there is one, else `folder`, resolved.

    Resolving once means that all files come from one version even while a renewal swaps the
    link.
    """
    current = folder / "current"
    return (current if current.exists() else folder).resolve()


def read_key_file(folder: Path, name: str) -> bytes:
    """Reads one file of a key folder.

    Raises:
        ConfigError: it is missing or cannot be read.
    """
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"{name} is missing in the key folder {folder}: make it with `make certs`, or point "
            "at the folder that holds it."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{folder / name} cannot be read ({error.strerror}): give it to this user, mode 0600."
        ) from None


def load_identity(folder: Path, role: Role) -> Identity:
    """Reads and checks the TLS files of a key folder.

    Checked: the key is an EC or RSA key and belongs to the certificate (gRPC cannot serve
    Ed25519), the certificate is valid now, and it chains to its root for this role.

    Raises:
        ConfigError: a file is missing, unreadable or does not pass a check.
    """
    source = resolve_current(folder)
    key_pem = read_key_file(source, f"{role}.key")
    chain_pem = read_key_file(source, f"{role}.crt")
    authority_pem = read_key_file(source, "ca.crt")
    chain_path = source / f"{role}.crt"
    try:
        key = load_pem_private_key(key_pem, None)
    except (ValueError, TypeError):
        raise ConfigError(
            f"{source / f'{role}.key'} is not an unencrypted PEM key: make a new one with "
            "`make certs`."
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise ConfigError(
            f"{source / f'{role}.key'} is not an elliptic-curve or RSA key, which TLS in gRPC "
            "needs: make a new one with `make certs`."
        )
    leaf, *between = _parse_chain(chain_pem, chain_path)
    _parse_chain(authority_pem, source / "ca.crt")
    root = "root.crt" if role == "server" else "ca.crt"
    roots = _parse_chain(read_key_file(source, root), source / root)
    if key.public_key() != leaf.public_key():
        raise ConfigError(
            f"{chain_path} was not issued for {role}.key beside it: fetch the certificate that "
            "belongs to this key, or make both anew with `make certs`."
        )
    _check_dates(leaf, chain_path)
    _check_chain(leaf, between, roots, role, chain_path)
    return Identity(
        folder=source,
        key_pem=key_pem,
        chain_pem=chain_pem,
        authority_pem=authority_pem,
        key_path=source / f"{role}.key",
        chain_path=chain_path,
        authority_path=source / "ca.crt",
        leaf=leaf,
    )


def probe_server(host: str, port: int, identity: Identity, timeout_seconds: float = 10.0) -> str:
    """Makes one TLS 1.3 handshake with a SuperLink and returns its serial number in hex.

    The wait for the first bytes matters: in TLS 1.3 a client's handshake is complete before
    the server has judged the client's certificate, and gRPC's server then closes silently.

    Raises:
        OSError: nothing answers there (yet).
        FederationError: the SuperLink answers, but one side refuses the other's certificate.
    """
    context = ssl.create_default_context(cafile=str(identity.authority_path))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(identity.chain_path, identity.key_path)
    where = f"the SuperLink at {host}:{port}"
    with socket.create_connection((host, port), timeout=timeout_seconds) as raw:
        try:
            secure = context.wrap_socket(raw, server_hostname=host)
        except ssl.SSLCertVerificationError as error:
            raise FederationError(_explain_refusal(error, where, host, identity)) from None
        except ssl.SSLError as error:
            raise FederationError(
                f"TLS 1.3 with {where} failed ({error.reason or 'connection closed'}): check that "
                "the address is the SuperLink's Fleet port."
            ) from None
        with secure:
            serial = str((secure.getpeercert() or {}).get("serialNumber", ""))
            try:
                accepted = bool(secure.recv(1))
            except (ssl.SSLError, ConnectionResetError):
                accepted = False
    if not accepted:
        raise FederationError(
            f"{where[0].upper()}{where[1:]} refuses the client certificate "
            f"{identity.chain_path}: ask the coordinator for one from its present authority."
        )
    return serial


def _parse_chain(pem: bytes, path: Path) -> list[x509.Certificate]:
    """Parses a file of PEM certificates."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ConfigError(
            f"{path} is not a PEM certificate: fetch it again, or make it with `make certs`."
        ) from None


def _check_dates(leaf: x509.Certificate, path: Path) -> None:
    """Refuses a certificate that is not valid now."""
    now = datetime.datetime.now(datetime.UTC)
    if now > leaf.not_valid_after_utc:
        raise ConfigError(
            f"{path} expired on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: renew it "
            "(`make certs`, or ask the coordinator)."
        )
    if now < leaf.not_valid_before_utc:
        raise ConfigError(
            f"{path} is not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: check "
            "this machine's clock."
        )


def _check_chain(
    leaf: x509.Certificate,
    between: list[x509.Certificate],
    roots: list[x509.Certificate],
    role: Role,
    path: Path,
) -> None:
    """Refuses a leaf that a peer with the same root would not accept for this role."""
    builder = PolicyBuilder().store(Store(roots))
    try:
        if role == "client":
            builder.build_client_verifier().verify(leaf, between)
        else:
            builder.build_server_verifier(_first_name(leaf)).verify(leaf, between)
    except (VerificationError, x509.ExtensionNotFound, StopIteration) as error:
        root = "root.crt" if role == "server" else "ca.crt"
        raise ConfigError(
            f"{path} is not a {role} certificate that chains to {root} beside it "
            f"({str(error).split(' (encountered')[0] or 'it names no host'}): fetch both from the "
            "same authority."
        ) from None


def _first_name(leaf: x509.Certificate) -> x509.DNSName | x509.IPAddress:
    """The first name that a server certificate is for."""
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return next(name for name in names if isinstance(name, x509.DNSName | x509.IPAddress))


def _explain_refusal(
    error: ssl.SSLCertVerificationError, where: str, host: str, identity: Identity
) -> str:
    """One sentence for a server certificate that this side refuses."""
    if error.verify_code == _EXPIRED:
        return (
            f"The certificate of {where} has expired: tell the coordinator to renew it, and check "
            "this machine's clock."
        )
    if error.verify_code == _NOT_YET_VALID:
        return f"The certificate of {where} is not valid yet: check this machine's clock."
    if error.verify_code in (_WRONG_HOST, _WRONG_ADDRESS):
        return (
            f"The certificate of {where} is not for the name {host}: use the name that the "
            "coordinator gave, or have it added to the certificate."
        )
    return (
        f"The certificate of {where} was not issued by the authority in "
        f"{identity.authority_path}: fetch the coordinator's present ca.crt."
    )
