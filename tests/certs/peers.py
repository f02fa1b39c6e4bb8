"""A gRPC server and clients that shake hands with the files that certs writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest


class _Peer(grpc.GenericRpcHandler):
    """Answers every call with what TLS says about the caller."""

    def service(self, handler_call_details: Any) -> Any:  # noqa: ARG002
        def answer(_: bytes, context: Any) -> bytes:
            peer = context.auth_context()
            return json.dumps({key: value[0].decode() for key, value in peer.items()}).encode()

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def serving(key: bytes, chain: bytes, trust: bytes) -> Iterator[int]:
    """Run a server that insists on client certificates; yields its port."""
    credentials = grpc.ssl_server_credentials([(key, chain)], trust, require_client_auth=True)
    with _running(credentials) as port:
        yield port


@contextmanager
def _running(credentials: grpc.ServerCredentials) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((_Peer(),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


@contextmanager
def superlink(out: Path, *, follow: bool = False) -> Iterator[int]:
    """Run a server with the SuperLink's files, as its launcher does.

    Args:
        out: the folder of all parties.
        follow: whether every new connection meets what is in the folder at that moment.
    """
    folder = out / "superlink" / "current"
    if not follow:
        with serving_folder(folder) as port:
            yield port
        return

    def configure() -> grpc.ServerCertificateConfiguration:
        key, chain, trust = _read_server(folder)
        return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=trust)

    credentials = grpc.dynamic_ssl_server_credentials(
        configure(), configure, require_client_authentication=True
    )
    with _running(credentials) as port:
        yield port


@contextmanager
def serving_folder(folder: Path) -> Iterator[int]:
    """Run a server with the files of one version of the SuperLink's folder."""
    with serving(*_read_server(folder)) as port:
        yield port


def _read_server(folder: Path) -> tuple[bytes, bytes, bytes]:
    key, chain, trust = ("server.key", "server.crt", "ca.crt")
    source = folder.resolve()
    return (
        (source / key).read_bytes(),
        (source / chain).read_bytes(),
        (source / trust).read_bytes(),
    )


def call(
    port: int, trust: bytes, key: bytes | None, chain: bytes | None, host: str = "localhost"
) -> dict[str, str]:
    """Call the server by one of its names; returns what it saw of the caller."""
    credentials = grpc.ssl_channel_credentials(trust, key, chain)
    # Only the name is replaced, not the check: the certificate has to be valid for `host`.
    options = (("grpc.ssl_target_name_override", host),)
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        seen: dict[str, str] = json.loads(channel.unary_unary("/peer/see")(b"", timeout=20))
        return seen


def call_as_site(
    port: int, out: Path, site: str = "a", host: str = "localhost", version: str = "current"
) -> dict[str, str]:
    """Call with a site's files, as its launcher does."""
    folder = out / "sites" / site / version
    files = ((folder / name).read_bytes() for name in ("ca.crt", "client.key", "client.crt"))
    return call(port, *files, host)


def assert_refused(attempt: Callable[[], object], reason: str = "") -> None:
    with pytest.raises(grpc.RpcError) as caught:
        attempt()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert reason in caught.value.details()
