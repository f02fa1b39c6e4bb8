"""Real handshakes with a SuperLink: which certificate it serves, and whether it takes a site's."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography import x509

from certs.files import CURRENT, CertificateError, MisuseError, read_certificates
from certs.renewal import format_serial

TIMEOUT_SECONDS = 10.0
_PAUSE_SECONDS = 0.5


def read_address(text: str) -> tuple[str, int]:
    """Return host and port of `host:port`; an IPv6 address stands in brackets.

    Raises:
        MisuseError: it is not that.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise MisuseError(f"{text!r} is not an address; write --connect HOST:PORT.")
    return host, int(port)


def serve_serial(address: tuple[str, int], roots: Path, client: Path | None = None) -> str:
    """Make one TLS 1.3 handshake and return the serial that the SuperLink serves, in hex.

    Args:
        address: host and port of the SuperLink's Fleet API.
        roots: what its certificate must come from (PEM).
        client: folder with the `client.key` and `client.crt` to present; None presents none, and
            then nothing is said about what the SuperLink thinks of its clients.

    Raises:
        CertificateError: nothing answers, or one side refuses the other.
    """
    where = f"The SuperLink at {address[0]}:{address[1]}"
    try:
        context = ssl.create_default_context(cafile=str(roots))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["h2"])
        if client is not None:
            context.load_cert_chain(client / "client.crt", client / "client.key")
    except OSError as error:  # ssl.SSLError is one
        raise CertificateError(
            f"{roots} or {client} cannot be used for a handshake ({error.strerror}); restore them."
        ) from error
    try:
        with (
            socket.create_connection(address, TIMEOUT_SECONDS) as raw,
            context.wrap_socket(raw, server_hostname=address[0]) as secure,
        ):
            served = secure.getpeercert(binary_form=True) or b""
            # In TLS 1.3 the client is done before the server has judged it: only what it sends
            # first, its settings, tells that it did not close.
            accepted = client is None or bool(secure.recv(1))
    except ssl.SSLCertVerificationError as error:
        raise CertificateError(
            f"{where} serves a certificate that who trusts {roots} refuses "
            f"({error.verify_message}); check the address, or restore the SuperLink's folder."
        ) from error
    except OSError as error:
        raise CertificateError(
            f"{where} does not complete a handshake ({error.strerror or error}); check that it "
            "runs and that this is its Fleet port."
        ) from error
    if not accepted:
        raise CertificateError(f"{where} refuses the certificate in {client}; run verify.")
    return format_serial(x509.load_der_x509_certificate(served))


def prove(
    out: Path, address: tuple[str, int], sites: Sequence[str], patience_seconds: float
) -> str:
    """Wait until the running SuperLink serves the certificate on disk and takes those of sites.

    Args:
        out: the folder of all parties.
        address: host and port of the SuperLink's Fleet API.
        sites: names of the sites whose certificates it has to take.
        patience_seconds: how long that may take.

    Returns:
        The serial that it serves, in hex.

    Raises:
        CertificateError: it does not in time; all that was changed stays changed.
    """
    folder = out / "superlink" / CURRENT
    expected = format_serial(read_certificates(folder / "server.crt")[0])

    def check() -> None:
        served = serve_serial(address, folder / "root.crt")
        if served != expected:
            raise CertificateError(
                f"The SuperLink at {address[0]}:{address[1]} still serves serial {served} instead "
                f"of {expected}; check that it reads {folder}, and its log."
            )
        for site in sites:
            client = out / "sites" / site / CURRENT
            serve_serial(address, client / "ca.crt", client)

    wait_for(check, patience_seconds)
    return expected


def wait_for(check: Callable[[], None], seconds: float) -> None:
    """Repeat a check until it passes: a SuperLink takes new files at its next connection.

    Raises:
        CertificateError: it still does not pass after these seconds; what it said last.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            return check()
        except CertificateError:
            if time.monotonic() >= end:
                raise
        time.sleep(_PAUSE_SECONDS)
