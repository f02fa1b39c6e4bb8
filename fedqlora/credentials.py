"""The one place where gRPC credentials that Flower makes are replaced.

Flower 1.39 has neither mutual TLS nor certificate reload. It makes its servers and channels by
calling `grpc.ssl_server_credentials` and `grpc.secure_channel` through the `grpc` module, so
replacing these two names before Flower starts is enough; `tests/launchers` fails when a new
Flower goes another way.

Guarantees: a server made after `serve_mutual_tls` accepts only clients whose certificate
chains to `ca.crt` (and only TLS 1.3, after `fedqlora.tls.prepare_grpc`); a certificate that does
not pass the checks of `fedqlora.tls` is never used; the last good one stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

from fedqlora.channel import ReplaceableChannel
from fedqlora.followed import Followed
from fedqlora.tls import Identity, Role, load_identity

NOT_ADMITTED = "This site's certificate and node key are not admitted."
"""What a SuperLink answers, with UNAUTHENTICATED, to a call that `server.admission` refuses.

Not PERMISSION_DENIED: Flower's SuperNode takes that for a run that has ended and stays, with its
heartbeat dead; after UNAUTHENTICATED it ends, as after an eviction."""

_FILES: dict[Role, tuple[str, ...]] = {
    "server": ("server.key", "server.crt", "ca.crt", "root.crt"),
    "client": ("client.key", "client.crt", "ca.crt"),
}


class ReloadingIdentity(Followed[Identity]):
    """An identity that follows its folder: swapped when a new, valid one is there."""

    def __init__(self, folder: Path, role: Role = "server") -> None:
        """Loads the first identity.

        Raises:
            ConfigError: the files do not pass the checks.
        """
        super().__init__(
            folder,
            _FILES[role],
            lambda source: load_identity(source, role),
            lambda identity: f"the certificate with serial {identity.serial}",
        )


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


class ClientCertificate:
    """What this process presents to the SuperLink; can be replaced while calls go on."""

    def __init__(self, identity: Identity) -> None:
        """Begins with an identity; nothing is presented before `install`."""
        self.identity = identity
        self._dial: Callable[[Identity], grpc.Channel] | None = None
        self._channel: ReplaceableChannel | None = None

    def install(self) -> None:
        """Makes the gRPC channels of this process present the certificate.

        The one made last follows `replace`: Flower's SuperNode makes a single one.
        """
        original = grpc.secure_channel

        def replaced(
            target: str,
            credentials: grpc.ChannelCredentials,  # noqa: ARG001
            options: Sequence[tuple[str, Any]] | None = None,
            compression: grpc.Compression | None = None,
        ) -> grpc.Channel:
            def dial(identity: Identity) -> grpc.Channel:
                own = grpc.ssl_channel_credentials(
                    identity.authority_pem, identity.key_pem, identity.chain_pem
                )
                return original(target, own, options, compression)

            self._dial = dial
            self._channel = ReplaceableChannel(dial(self.identity))
            return self._channel

        grpc.secure_channel = replaced

    def replace(self, identity: Identity, accepts: Callable[[grpc.Channel], bool]) -> bool:
        """Presents another identity from now on, over a new connection; returns whether it does.

        Args:
            identity: the new one, checked.
            accepts: tries the new connection before it is used; the present one serves meanwhile
                and stays if the answer is no.
        """
        if self._dial is None or self._channel is None:
            return False
        connection = self._dial(identity)
        if not accepts(connection):
            connection.close()
            return False
        self.identity = identity
        self._channel.replace(connection)
        return True
