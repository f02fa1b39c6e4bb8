"""The one place where gRPC credentials that Flower makes are replaced.

Flower 1.39 has neither mutual TLS nor certificate reload. It makes its credentials by calling
`grpc.ssl_server_credentials` and `grpc.ssl_channel_credentials` through the `grpc` module, so
replacing these two names before Flower starts is enough; `tests/launchers` fails when a new
Flower goes another way.

Guarantees: a server made after `serve_mutual_tls` accepts only clients whose certificate
chains to `ca.crt` (and only TLS 1.3, after `fedqlora.tls.prepare_grpc`); a certificate that does
not pass the checks of `fedqlora.tls` is never served; the last good one stays.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import grpc

from fedqlora.errors import ConfigError
from fedqlora.tls import Identity, load_identity, resolve_current

logger = logging.getLogger("fedqlora")


class ReloadingIdentity:
    """A server's identity that follows its folder: swapped when a new, valid one is there."""

    def __init__(self, folder: Path) -> None:
        """Loads the first identity.

        Raises:
            ConfigError: the files do not pass the checks.
        """
        self._folder = folder
        self._lock = threading.Lock()
        self._good = load_identity(folder, "server")
        self._seen = self._stamp()

    def follow(self) -> Identity:
        """Returns the newest identity that passed the checks; cheap when no file has changed.

        A bad one is logged once, and again only after its files have changed.
        """
        with self._lock:
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                try:
                    self._good = load_identity(self._folder, "server")
                    logger.info("Serving the certificate with serial %s.", self._good.serial)
                except ConfigError as error:
                    logger.error(
                        "Keeping the certificate with serial %s, the new one is bad: %s",
                        self._good.serial,
                        error,
                    )
            return self._good

    def _stamp(self) -> tuple[object, ...]:
        """What changes when any of the files does; missing files count as a state."""
        source = resolve_current(self._folder)
        stamp: list[object] = [source]
        for name in ("server.key", "server.crt", "ca.crt", "root.crt"):
            try:
                status = (source / name).stat()
                stamp.append((status.st_ino, status.st_mtime_ns, status.st_size))
            except OSError:
                stamp.append(None)
        return tuple(stamp)


def serve_mutual_tls(identities: ReloadingIdentity) -> None:
    """Makes every gRPC server of this process demand client certificates and follow renewals.

    The fetcher runs on each new connection, before its handshake; open connections keep the
    certificate they were made with.
    """
    served = identities.follow()

    def configure() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(served.key_pem, served.chain_pem)], root_certificates=served.authority_pem
        )

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal served
        newest = identities.follow()
        if newest is served:
            return None
        served = newest
        return configure()

    def replaced(
        private_key_certificate_chain_pairs: Sequence[tuple[bytes, bytes]],  # noqa: ARG001
        root_certificates: bytes | None = None,  # noqa: ARG001
        require_client_auth: bool = False,  # noqa: ARG001
    ) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            configure(),
            fetch,  # type: ignore[arg-type]  # None means no change, which the stubs leave out
            require_client_authentication=True,
        )

    grpc.ssl_server_credentials = replaced


def present_client_certificate(identity: Identity) -> None:
    """Makes every gRPC channel of this process present the client certificate."""
    original = grpc.ssl_channel_credentials

    def replaced(
        root_certificates: bytes | None = None,  # noqa: ARG001
        private_key: bytes | None = None,  # noqa: ARG001
        certificate_chain: bytes | None = None,  # noqa: ARG001
    ) -> grpc.ChannelCredentials:
        return original(identity.authority_pem, identity.key_pem, identity.chain_pem)

    grpc.ssl_channel_credentials = replaced
