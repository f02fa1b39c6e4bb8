"""Mutual TLS and renewal of certificates, in Flower's own server and channel."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from flwr.proto.fleet_pb2_grpc import FleetServicer, add_FleetServicer_to_server
from flwr.supercore.grpc import create_channel, generic_create_grpc_server

from certs import renewal
from demo.processes import LocalFederation
from fedqlora.address import split_address
from fedqlora.credentials import (
    ClientCertificate,
    ReloadingIdentity,
    serve_mutual_tls,
)
from fedqlora.errors import ConfigError, FederationError
from fedqlora.tls import Identity, load_identity, probe_server
from tests.launchers.leaves import issue


@pytest.fixture
def superlink_keys(certs: Path, tmp_path: Path) -> Path:
    """A copy of the SuperLink's folder that a test may renew: v1 and `current`."""
    return shutil.copytree(certs / "superlink", tmp_path / "superlink", symlinks=True)


@pytest.fixture
def site(certs: Path) -> Identity:
    return load_identity(certs / "sites" / "a", "client")


@pytest.fixture
def flower_server(
    superlink_keys: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, int]]:
    """Flower's own gRPC server, made after `serve_mutual_tls`."""
    monkeypatch.setattr(grpc, "ssl_server_credentials", grpc.ssl_server_credentials)
    serve_mutual_tls(ReloadingIdentity(superlink_keys))
    server = generic_create_grpc_server(
        servicer_and_add_fn=(FleetServicer(), add_FleetServicer_to_server),
        server_address="127.0.0.1:0",
        certificates=(b"Flower's", b"own", b"files"),
    )
    server.start()
    yield "127.0.0.1", int(server.bound_address.rpartition(":")[2])
    server.stop(grace=None)


def renew(folder: Path, certs: Path, version: str) -> str:
    """Writes the next version beside the present one and swaps `current`, as a renewal does."""
    shutil.copytree(folder / "current", folder / version)
    serial = issue(certs, "server", folder / version)
    (folder / "next").symlink_to(version)
    (folder / "next").rename(folder / "current")
    return serial


@pytest.mark.parametrize(("serial", "printed"), [(0xDBD, "0DBD"), (0xADBD, "ADBD")])
def test_a_launcher_prints_a_serial_as_the_certificates_commands_do(
    certs: Path, tmp_path: Path, serial: int, printed: str
) -> None:
    shutil.copytree(certs / "sites" / "a" / "current", tmp_path / "a")
    assert issue(certs, "client", tmp_path / "a", serial=serial) == printed
    identity = load_identity(tmp_path / "a", "client")
    assert identity.serial == renewal.format_serial(identity.leaf) == printed


def test_flowers_server_demands_a_certificate_and_flowers_channel_presents_it(
    flower_server: tuple[str, int], site: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails when a new Flower makes its credentials in another way."""
    address = f"127.0.0.1:{flower_server[1]}"
    monkeypatch.setattr(grpc, "secure_channel", grpc.secure_channel)
    with create_channel(address, insecure=False, root_certificates=site.authority_pem) as bare:
        ready = grpc.channel_ready_future(bare)
        with pytest.raises(grpc.FutureTimeoutError):
            ready.result(timeout=1.0)
        ready.cancel()
    ClientCertificate(site).install()
    with create_channel(address, insecure=False, root_certificates=b"unused") as channel:
        grpc.channel_ready_future(channel).result(timeout=10.0)


def test_a_renewed_certificate_is_served_to_the_next_handshake(
    flower_server: tuple[str, int], superlink_keys: Path, site: Identity, certs: Path
) -> None:
    before = load_identity(superlink_keys, "server").serial
    assert int(probe_server(*flower_server, site), 16) == int(before, 16)
    serial = renew(superlink_keys, certs, "v2")
    assert serial != before
    assert int(probe_server(*flower_server, site), 16) == int(serial, 16)


@pytest.mark.parametrize("name", ["server.crt", "server.key", "ca.crt", "root.crt"])
def test_a_garbage_file_keeps_the_last_good_certificate_until_it_is_repaired(
    flower_server: tuple[str, int],
    superlink_keys: Path,
    site: Identity,
    certs: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    before = probe_server(*flower_server, site)
    serial = renew(superlink_keys, certs, "v2")
    good = (superlink_keys / "v2" / name).read_bytes()
    (superlink_keys / "v2" / name).write_bytes(b"garbage")
    assert probe_server(*flower_server, site) == before
    assert probe_server(*flower_server, site) == before
    assert [record.message for record in caplog.records if "Keeping the" in record.message] == [
        caplog.messages[0]
    ]
    assert name in caplog.messages[0]
    (superlink_keys / "v2" / name).write_bytes(good)
    assert int(probe_server(*flower_server, site), 16) == int(serial, 16)


def test_an_expired_or_foreign_renewal_is_not_served(
    superlink_keys: Path, certs: Path, foreign_certs: Path
) -> None:
    identities = ReloadingIdentity(superlink_keys)
    good = identities.follow()
    issue(certs, "server", superlink_keys / "v1", days=-1)
    assert identities.follow() is good
    issue(foreign_certs, "server", superlink_keys / "v1")
    assert identities.follow() is good
    issue(certs, "client", superlink_keys / "v1")
    assert identities.follow() is good
    serial = issue(certs, "server", superlink_keys / "v1")
    assert identities.follow().serial == serial


def test_a_start_with_a_bad_certificate_is_refused(superlink_keys: Path, certs: Path) -> None:
    issue(certs, "server", superlink_keys / "v1", days=-1)
    with pytest.raises(ConfigError, match="expired on"):
        ReloadingIdentity(superlink_keys)


def test_an_expired_superlink_certificate_is_named(
    certs: Path, site: Identity, tmp_path: Path
) -> None:
    issue(certs, "server", tmp_path, days=-1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, pytest.raises(ssl.SSLError):
                context.wrap_socket(connection, server_side=True)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(FederationError, match="has expired"):
            probe_server("127.0.0.1", listener.getsockname()[1], site)
        thread.join()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("port", ["fleet", "control"])
def test_the_superlink_speaks_tls_13_only(
    federation: LocalFederation, site: Identity, version: ssl.TLSVersion, port: str
) -> None:
    address = {"fleet": federation.fleet_address, "control": federation.control_address}[port]
    context = ssl.create_default_context(cafile=str(site.authority_path))
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(site.chain_path, site.key_path)
    with socket.create_connection(split_address(address, "")) as raw:
        if version == ssl.TLSVersion.TLSv1_2:
            with pytest.raises(ssl.SSLError):
                context.wrap_socket(raw, server_hostname="127.0.0.1")
        else:
            with context.wrap_socket(raw, server_hostname="127.0.0.1") as secure:
                assert secure.version() == "TLSv1.3"


def test_the_superlink_sends_nothing_to_a_client_without_a_certificate(
    federation: LocalFederation, site: Identity
) -> None:
    context = ssl.create_default_context(cafile=str(site.authority_path))
    context.set_alpn_protocols(["h2"])
    host, port = split_address(federation.fleet_address, "")
    with (
        socket.create_connection((host, port)) as raw,
        context.wrap_socket(raw, server_hostname=host) as secure,
    ):
        try:
            answer = secure.recv(1)
        except (ssl.SSLError, ConnectionResetError):
            answer = b""
    assert answer == b""
